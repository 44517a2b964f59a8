"""Times that others measured on real chips, and the call that they timed."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Self

Layout = Literal["HEAD_DIM_MINOR", "SEQ_MINOR"]
_LAYOUTS = ("HEAD_DIM_MINOR", "SEQ_MINOR")

#: The public rows that the constants of the time model are fitted on.
DEFAULT_PATH = Path(__file__).parent / "data" / "measured_v6e_tokamax_splash.json"


@dataclasses.dataclass(frozen=True)
class ReportedRow:
    """One call of tokamax's splash attention, and how long it took where it was measured.

    Attributes:
      batch_size, seq_len, num_heads, head_dim, dtype: of q `[batch, seq, heads, head_dim]`.
      kv_seq_len, num_kv_heads: of k and v; None: as q.
      is_causal, return_residuals: arguments of the op.
      block_q, block_kv, block_kv_compute, q_layout, k_layout, v_layout, use_base2_exp: tokamax's configuration.
      lp_llo_scheduler: tokamax's `use_experimental_scheduler`.
      median_time_ms: device time as it was reported.
    """

    batch_size: int
    seq_len: int
    num_heads: int
    head_dim: int
    block_q: int
    block_kv: int
    block_kv_compute: int
    q_layout: Layout
    k_layout: Layout
    v_layout: Layout
    lp_llo_scheduler: bool
    median_time_ms: float
    dtype: str = "bfloat16"
    kv_seq_len: int | None = None
    num_kv_heads: int | None = None
    is_causal: bool = False
    return_residuals: bool = False
    use_base2_exp: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "num_heads", "head_dim", "block_q", "block_kv", "block_kv_compute"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer.")
        for name in ("q_layout", "k_layout", "v_layout"):
            if getattr(self, name) not in _LAYOUTS:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(_LAYOUTS)}.")
        if not self.median_time_ms > 0:
            raise ValueError(f"median_time_ms={self.median_time_ms!r}: expected a positive time.")

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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Reported:
    """A file of rows.

    Attributes:
      source: who measured, where it is published, and how.
      device_kind: of the chip, as JAX says it.
    """

    source: str
    device_kind: str
    rows: tuple[ReportedRow, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a file of the form of `DEFAULT_PATH`.

        Raises:
          ValueError: there is no such file, or it is not of that form.
        """
        try:
            content = json.loads(path.read_text())
            rows = []
            for number, fields in enumerate(content["rows"]):
                try:
                    rows.append(ReportedRow(**fields))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"row {number}: {error}") from error
            if not rows:
                raise ValueError("expected at least one row.")
            return cls(source=content["source"], device_kind=content["device_kind"], rows=tuple(rows))
        except FileNotFoundError as error:
            raise ValueError(f"measured={path}: there is no such file.") from error
        except KeyError as error:
            raise ValueError(f"measured={path}: expected a field {error}.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"measured={path}: {error}") from error
