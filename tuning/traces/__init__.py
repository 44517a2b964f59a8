"""Sweeps, for TensorBoard."""
