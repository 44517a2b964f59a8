"""Text to video with CogVideoX through torchax: T5 encode, transformer denoise, VAE decode, each stage on its own."""

from splash_workbench.startup import quit_on_interrupt

quit_on_interrupt()
