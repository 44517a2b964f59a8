"""What sweeps leave for TensorBoard."""
