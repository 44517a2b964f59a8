"""The same programs, compiled for chips that are not here: `python -m pipeline.predict --help`."""
