"""What is asked for: request, configuration, names, batches, models, parallelism."""
