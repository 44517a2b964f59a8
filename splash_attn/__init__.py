"""Splash attention for video transformers on TPU: a Pallas kernel, its tuned block sizes, and a reference."""

from splash_attn.api import attention as attention
from splash_attn.reference import attention_reference as attention_reference
from splash_attn.types import SEED_BLOCK_SIZES as SEED_BLOCK_SIZES
from splash_attn.types import AttentionShape as AttentionShape
from splash_attn.types import BlockSizes as BlockSizes
from splash_attn.types import Variant as Variant
