"""Describes the chips: published figures, fitted constants, DMA timing and links between chips."""
