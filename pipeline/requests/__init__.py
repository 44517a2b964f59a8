"""What is asked for: request, configuration, names, batches, parallel plans."""
