"""The fastest compiler options of a denoising step, for chips that are not here: `python -m pipeline.tune --help`."""
