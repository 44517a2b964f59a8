"""Fits the constants of the time model: `python -m tuning.validate.fit --help`."""
