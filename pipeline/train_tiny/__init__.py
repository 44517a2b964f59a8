"""Train the tiny model: `python -m pipeline.train_tiny --help`."""
