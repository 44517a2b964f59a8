"""The networks as JAX functions, and their sharding."""
