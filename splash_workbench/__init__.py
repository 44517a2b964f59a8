"""Holds what every command stands on: the command line, files, provenance, worker processes, profiles."""
