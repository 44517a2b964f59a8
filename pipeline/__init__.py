"""Text to video with CogVideoX through torchax: T5 encode, transformer denoise, VAE decode, each stage on its own."""
