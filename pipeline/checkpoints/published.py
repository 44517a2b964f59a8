"""Configurations of published checkpoints, so that their cost can be predicted without fetching anything.

From diffusers' conversion script for CogVideoX 1.5 (scripts/convert_cogvideox_to_diffusers.py) and the T5 v1.1 XXL
encoder that it names. Keys that are left out have the libraries' defaults. What a request for such a model is, where
nothing else is said, is in `pipeline.requests.models`.
"""

from collections.abc import Mapping
from typing import Any

COGVIDEOX_1_5_5B: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_layers": 42,
        "num_attention_heads": 48,
        "sample_width": 300,
        "sample_height": 300,
        "sample_frames": 81,
        "patch_size_t": 2,
        "patch_bias": False,
        "use_rotary_positional_embeddings": True,
    },
    "vae": {
        "_class_name": "AutoencoderKLCogVideoX",
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "scaling_factor": 0.7,
    },
    "text_encoder": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler": {
        "_class_name": "CogVideoXDDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    },
}

PUBLISHED_CONFIGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"zai-org/CogVideoX1.5-5B": COGVIDEOX_1_5_5B}
