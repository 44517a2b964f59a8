"""Worker processes that stay warm, and a cache of their outcomes."""
