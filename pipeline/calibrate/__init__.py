"""MagCache's ratios of a checkpoint, from one run of it: `python -m pipeline.calibrate --help`."""
