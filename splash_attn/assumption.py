"""What a prediction assumes of a call whose grids depend on the data."""

import dataclasses

from splash_attn.kernel import kernel_name
from splash_attn.types import AttentionShape, Variant


def assumed_grid_sizes(shape: AttentionShape, variant: Variant) -> tuple[dict[str, int], tuple[str, ...]]:
    """Gives all heads to the kernel of `variant`, and none to its fallbacks.

    Returns:
      Heads by Pallas kernel name, as `offline_tpu.predict` takes them, and the assumption in words; both empty where
      nothing depends on the data.
    """
    if variant.softmax == "online":
        return {}, ()
    heads = shape.batch_size * shape.num_heads
    ways = [variant, dataclasses.replace(variant, qk_dtype="bfloat16"), Variant(softmax="online")]
    grid_sizes = {kernel_name(way): 0 for way in ways} | {kernel_name(variant): heads}
    return grid_sizes, (f"assumes that {kernel_name(variant)} may have all {heads} heads",)
