"""The attention kernels that a trial can be about: ours, and the peers that are installed.

Each takes q, k, v `[batch, heads, seq, head_dim]` and does everything that its caller would have to do around it.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import jax

import splash_attn
from splash_attn.types import BlockSizes, Variant

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel by name.

    Attributes:
      build: (block_sizes, variant, implementation) -> the callable.
      requires: module that must be importable.
      extra: the optional extra of this project that installs it, None where it comes with the project.
      notes: what a reader of its figures must know.
    """

    build: Callable[[BlockSizes, Variant, str], Attention]
    requires: str
    extra: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.requires.partition(".")[0]) is not None


def _ours(block_sizes: BlockSizes, variant: Variant, implementation: str) -> Attention:
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_attn.attention(q, k, v, block_sizes=block_sizes, variant=variant, implementation=implementation)

    return attention


KERNELS = {
    "splash_attn": Kernel(build=_ours, requires="splash_attn"),
}
