"""Times that others measured on real chips, and the call that they timed."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

Layout = Literal["HEAD_DIM_MINOR", "SEQ_MINOR"]
Size = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]

#: The public rows that the constants of the time model are fitted on.
DEFAULT_PATH = Path(__file__).parents[1] / "data" / "measured_v6e_tokamax_splash.json"


class ReportedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call of tokamax's splash attention, and how long it took where it was measured.

    Attributes:
      batch_size, seq_len, num_heads, head_dim, dtype: of q `[batch, seq, heads, head_dim]`.
      kv_seq_len, num_kv_heads: of k and v; None: as q.
      is_causal, return_residuals: arguments of the op.
      block_q, block_kv, block_kv_compute, q_layout, k_layout, v_layout, use_base2_exp: tokamax's configuration.
      lp_llo_scheduler: tokamax's `use_experimental_scheduler`.
      median_time_ms: device time as it was reported.

    Raises:
      ValueError: a value does not fit another, or the time is not one.
    """

    batch_size: Size
    seq_len: Size
    num_heads: Size
    head_dim: Size
    block_q: Size
    block_kv: Size
    block_kv_compute: Size
    q_layout: Layout
    k_layout: Layout
    v_layout: Layout
    lp_llo_scheduler: bool
    median_time_ms: float
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kv_seq_len: Size | None = None
    num_kv_heads: Size | None = None
    is_causal: bool = False
    return_residuals: bool = False
    use_base2_exp: bool = True

    def __post_init__(self) -> None:
        if self.block_kv % self.block_kv_compute:
            raise ValueError(f"block_kv_compute={self.block_kv_compute}: expected a divisor of {self.block_kv=}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: expected a divisor of {self.num_heads=}.")
        if not 0 < self.median_time_ms < math.inf:
            raise ValueError(f"median_time_ms={self.median_time_ms}: expected a positive number of milliseconds.")

    @property
    def shape(self) -> str:
        """For tables, e.g. "1x16384x32x64" or "1x16384x32x64 causal"."""
        text = f"{self.batch_size}x{self.seq_len}x{self.num_heads}x{self.head_dim}"
        if self.kv_seq_len not in (None, self.seq_len) or self.num_kv_heads not in (None, self.num_heads):
            text += f" kv {self.kv_seq_len or self.seq_len}x{self.num_kv_heads or self.num_heads}"
        return text + (" causal" if self.is_causal else "") + (" residuals" if self.return_residuals else "")

    @property
    def config(self) -> str:
        """Block sizes, layouts of q, k and v (h: head_dim minor, s: seq minor) and scheduler, for tables."""
        layouts = "".join("s" if x == "SEQ_MINOR" else "h" for x in (self.q_layout, self.k_layout, self.v_layout))
        scheduler = " lp" if self.lp_llo_scheduler else ""
        return f"{self.block_q}/{self.block_kv}/{self.block_kv_compute} {layouts}{scheduler}"


class Reported(msgspec.Struct, frozen=True):
    """A file of rows, and who measured them on which chip (as JAX says it), where it is published, and how."""

    source: Text
    device_kind: Text
    rows: Annotated[tuple[ReportedRow, ...], msgspec.Meta(min_length=1)]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of the form of `DEFAULT_PATH`. Raises ValueError where it is not, with the path of the field."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise ValueError(f"measured={path}: there is no such file.") from error
        except OSError as error:
            raise ValueError(f"measured={path}: cannot be read ({error}).") from error
        except msgspec.DecodeError as error:
            raise ValueError(f"measured={path}: {error}; expected the form of {DEFAULT_PATH.name}.") from error
