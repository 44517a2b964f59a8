"""The three stages: text, denoise, VAE; their progress, and how denoising resumes."""
