"""Requests: their fields, checks, configuration, names, batches, models and parallelism."""
