"""Jobs in worker processes that stay warm, and their outcomes on disk."""
