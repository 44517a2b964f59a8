"""Predictions against reported and measured times: `python -m tuning.validate --help`."""
