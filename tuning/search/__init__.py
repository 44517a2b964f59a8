"""The search: its space, its sampler and its settings."""
