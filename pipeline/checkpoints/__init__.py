"""Checkpoints: which files, loading them, and the tiny model's own."""
