"""Judge what a kernel variant or a plan does to videos: `python -m pipeline.quality --help`."""
