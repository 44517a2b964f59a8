"""Profiles side by side: `python -m tuning.compare --help`."""
