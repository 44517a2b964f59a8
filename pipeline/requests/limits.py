"""The limits of a request's numbers. Imports nothing: the ComfyUI nodes read this file before anything is loaded."""

SIZE_MULTIPLE = 16  # 8 pixels a latent (VAE) times 2 latents a patch (transformer)
FRAME_MULTIPLE = 8  # 4 frames a latent (VAE) times 2 latents a patch (transformer, patch_size_t)
MAX_SIDE = 4096
MAX_FRAMES = 1001
MAX_STEPS = 1000
MAX_GUIDANCE = 1000
MAX_FPS = 240
MAX_STRENGTH = 10  # of a LoRA
MAX_VIDEOS = 1000  # of one prompt
