"""The autotuner: sweeps, predictions, measurements and their records."""
