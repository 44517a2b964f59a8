"""The frozen values that describe one attention call and one way to run it."""

import dataclasses
import operator
from typing import Any, Literal, Self, get_args

LANES = 128
MAX_HEAD_DIM = 256

Softmax = Literal["online", "fixed_bound"]
QkDtype = Literal["bfloat16", "int8"]


#: Marks a field that only the TPU compiler sees: it changes no number.
_COMPILE_ONLY = {"compile_only": True}


def _set_int(self: object, name: str, minimum: int = 1, multiple: int = 1) -> None:
    """Make a field of a frozen dataclass a Python int, whatever integer it was given as.

    Raises:
      ValueError: it is not an integer (a bool is none), too small, or no multiple.
    """
    value = getattr(self, name)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = minimum - 1
    if number < minimum:
        expected = "a positive integer" if minimum else "an integer of at least 0"
        raise ValueError(f"{name}={value!r}: expected {expected}.")
    if number % multiple:
        raise ValueError(f"{name}={number}: expected a multiple of {multiple}.")
    object.__setattr__(self, name, number)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of `softmax(q k^T) v` with q `[batch, heads, q_seq, head_dim]`.

    Raises:
      ValueError: a size is not a positive integer, or head_dim is not a multiple of 8 up to 256.
    """

    batch_size: int
    num_heads: int
    q_seq_len: int
    kv_seq_len: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _set_int(self, field.name)
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim={self.head_dim}: expected a multiple of 8 up to {MAX_HEAD_DIM}; "
                "pad q, k and v with zero columns and slice the output."
            )

    @property
    def flops(self) -> int:
        """FLOPs of the two matrix products: 4 * batch * heads * q * kv * head_dim."""
        return 4 * self.batch_size * self.num_heads * self.q_seq_len * self.kv_seq_len * self.head_dim

    def __str__(self) -> str:
        seq = str(self.q_seq_len)
        if self.kv_seq_len != self.q_seq_len:
            seq = f"{self.q_seq_len}:{self.kv_seq_len}"
        return f"{self.batch_size}x{self.num_heads}x{seq}x{self.head_dim}"


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of q and of k/v that the kernel holds in VMEM, and k/v rows per inner step.

    Raises:
      ValueError: a size is not a positive multiple of 128 (the lane count), or
        block_kv_compute does not divide block_kv.
    """

    block_q: int
    block_kv: int
    block_kv_compute: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _set_int(self, field.name, multiple=LANES)
        if self.block_kv % self.block_kv_compute:
            raise ValueError(
                f"block_kv_compute={self.block_kv_compute}: expected a divisor of block_kv={self.block_kv}."
            )

    def __str__(self) -> str:
        return f"{self.block_q}/{self.block_kv}/{self.block_kv_compute}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the tuner may change besides the block sizes. Every variant but int8 computes the same attention.

    Attributes:
      softmax: "online" keeps a running maximum; "fixed_bound" does without, for the heads where that is provably exact,
        and gives the others to "online".
      qk_dtype: "int8" quantises q and k, for the heads whose predicted error is within `gates.INT8_ERROR_BUDGET`, and
        treats the others as "bfloat16" does. Faster and not exact; nothing chooses it unless asked to.
      block_q_compute: query columns of one score tile; a multiple of 128.
      lookahead: score tiles that are started before a tile's exponentials are taken.
      unroll_q: queries whose tiles are unrolled into straight-line code, a multiple of 128; None for the whole block_q.
        Less is quicker to compile and slower to run.
      lp_scheduler: compile with the linear-programming instruction scheduler of the TPU compiler.
      vmem_limit_bytes: VMEM that the compiler may give the kernel; None is the compiler's default.
    """

    softmax: Softmax = "fixed_bound"
    qk_dtype: QkDtype = "bfloat16"
    block_q_compute: int = 256
    lookahead: int = 4
    unroll_q: int | None = None
    lp_scheduler: bool = dataclasses.field(default=False, metadata=_COMPILE_ONLY)
    vmem_limit_bytes: int | None = dataclasses.field(default=None, metadata=_COMPILE_ONLY)

    def __post_init__(self) -> None:
        if self.softmax not in get_args(Softmax):
            raise ValueError(f"softmax={self.softmax!r}: expected one of {get_args(Softmax)}.")
        if self.qk_dtype not in get_args(QkDtype):
            raise ValueError(f"qk_dtype={self.qk_dtype!r}: expected one of {get_args(QkDtype)}.")
        if self.qk_dtype == "int8" and self.softmax != "fixed_bound":
            raise ValueError(f"softmax={self.softmax!r} qk_dtype='int8': expected softmax='fixed_bound' with int8.")
        _set_int(self, "block_q_compute", multiple=LANES)
        _set_int(self, "lookahead", minimum=0)
        if self.unroll_q is not None:  # None is all of block_q
            _set_int(self, "unroll_q", multiple=LANES)
        if self.vmem_limit_bytes is not None:
            _set_int(self, "vmem_limit_bytes")
        if not isinstance(self.lp_scheduler, bool):
            raise ValueError(f"lp_scheduler={self.lp_scheduler!r}: expected True or False.")

    def __str__(self) -> str:
        text = f"{self.softmax}/{self.block_q_compute}/{self.lookahead}"
        if self.unroll_q is not None:
            text += f"/{self.unroll_q}"
        return text + ("+int8" if self.qk_dtype == "int8" else "") + ("+lp" if self.lp_scheduler else "")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        return cls(**fields)


#: The block sizes of the published CogVideoX kernel for TPU v6e (BQSIZE, BKVSIZE, BKVCOMPUTESIZE).
SEED_BLOCK_SIZES = BlockSizes(block_q=3328, block_kv=2816, block_kv_compute=256)


def clamp(block_sizes: BlockSizes, shape: AttentionShape) -> BlockSizes:
    """Return the same blocks, no longer than the sequences rounded up to what a block must be a multiple of."""
    block_kv_compute = min(block_sizes.block_kv_compute, round_up(shape.kv_seq_len, LANES))
    return BlockSizes(
        block_q=min(block_sizes.block_q, round_up(shape.q_seq_len, LANES)),
        block_kv=min(
            block_sizes.block_kv // block_kv_compute * block_kv_compute,
            round_up(shape.kv_seq_len, block_kv_compute),
        ),
        block_kv_compute=block_kv_compute,
    )


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is not less than a value."""
    return -(-value // multiple) * multiple
