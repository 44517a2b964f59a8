"""The VAE: decoder and encoder, and what both are made of."""
