"""Configurations of published checkpoints, so that their cost can be predicted without fetching anything.

From diffusers' conversion script (scripts/convert_cogvideox_to_diffusers.py) and the T5 v1.1 XXL encoder that it names.
Keys that are left out have the libraries' defaults. What a request for such a model is, where nothing else is said, is
in `pipeline.requests.models`.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
_T5_XXL: Config = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_5B: Config = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
_1_5: Config = {
    **_5B,
    "sample_width": 300,
    "sample_height": 300,
    "sample_frames": 81,
    "patch_size_t": 2,
    "patch_bias": False,
}
_FROM_IMAGE: Config = {"in_channels": 32}


def _published(transformer: Config, scaling_factor: float = 0.7, snr_shift_scale: float = 1.0) -> Mapping[str, Config]:
    """Return the configurations of all parts."""
    return {
        "transformer": {"_class_name": "CogVideoXTransformer3DModel", **transformer},
        "vae": {
            "_class_name": "AutoencoderKLCogVideoX",
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "scaling_factor": scaling_factor,
            # Of image latents only, of which CogVideoX 1.5 was trained with the inverse.
            **({"invert_scale_latents": True} if "ofs_embed_dim" in transformer else {}),
        },
        "text_encoder": _T5_XXL,
        "scheduler": {
            "_class_name": "CogVideoXDDIMScheduler",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": snr_shift_scale,
            "timestep_spacing": "trailing",
        },
    }


COGVIDEOX_1_5_5B = _published(_1_5)
PUBLISHED_CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "zai-org/CogVideoX-2b": _published({}, scaling_factor=1.15258426, snr_shift_scale=3.0),
    "zai-org/CogVideoX-5b": _published(_5B),
    "zai-org/CogVideoX-5b-I2V": _published({**_5B, **_FROM_IMAGE, "use_learned_positional_embeddings": True}),
    "zai-org/CogVideoX1.5-5B": COGVIDEOX_1_5_5B,
    "zai-org/CogVideoX1.5-5B-I2V": _published({**_1_5, **_FROM_IMAGE, "ofs_embed_dim": 512}),
}
