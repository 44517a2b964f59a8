"""The networks as JAX functions, and what is sharded how."""
