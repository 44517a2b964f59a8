"""Reads and writes profiles (XSpace)."""
