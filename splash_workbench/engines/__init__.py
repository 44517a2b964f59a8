"""Engines: what runs the work where it is not this machine alone."""
