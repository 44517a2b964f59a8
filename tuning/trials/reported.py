"""Times that others measured on real chips, and the call that they timed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, Self

Layout = Literal["HEAD_DIM_MINOR", "SEQ_MINOR"]
_DTYPES = ("bfloat16", "float32")
_SIZES = ("batch_size", "seq_len", "num_heads", "head_dim", "block_q", "block_kv", "block_kv_compute")
_LAYOUTS = ("HEAD_DIM_MINOR", "SEQ_MINOR")

#: The public rows that the constants of the time model are fitted on.
DEFAULT_PATH = Path(__file__).parents[1] / "data" / "measured_v6e_tokamax_splash.json"


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

    Raises:
      ValueError: a value is out of range, or does not fit another.
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
        sizes = {name: getattr(self, name) for name in _SIZES}
        sizes |= {name: value for name in ("kv_seq_len", "num_kv_heads") if (value := getattr(self, name)) is not None}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer.")
        for name in ("q_layout", "k_layout", "v_layout"):
            if getattr(self, name) not in _LAYOUTS:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(_LAYOUTS)}.")
        for name in ("is_causal", "return_residuals", "use_base2_exp", "lp_llo_scheduler"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected true or false.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(_DTYPES)}.")
        if self.block_kv % self.block_kv_compute:
            raise ValueError(f"block_kv_compute={self.block_kv_compute}: expected a divisor of {self.block_kv=}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: expected a divisor of {self.num_heads=}.")
        time_ms = self.median_time_ms
        if type(time_ms) not in (int, float) or not 0 < time_ms < math.inf:
            raise ValueError(f"median_time_ms={time_ms!r}: expected a positive number of milliseconds.")

    @classmethod
    def from_dict(cls, fields: object) -> Self:
        """Raises ValueError where `fields` is not a mapping of known names, or a needed one is missing."""
        if not isinstance(fields, dict):
            raise ValueError(f"{fields!r}: expected an object.")
        known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"unknown key {', '.join(unknown)}: expected {', '.join(known)}.")
        if missing := [name for name, needed in known.items() if needed and name not in fields]:
            raise ValueError(f"missing key {', '.join(missing)}.")
        return cls(**fields)

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
        except FileNotFoundError as error:
            raise ValueError(f"measured={path}: there is no such file.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"measured={path}: cannot be read ({error}).") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"measured={path}: expected JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"measured={path}: expected an object with the keys source, device_kind and rows.")
        for name, kind in (("source", str), ("device_kind", str), ("rows", list)):
            if not isinstance(content.get(name), kind) or not content[name]:
                expected = "at least one row" if name == "rows" else "text"
                raise ValueError(f"measured={path}: {name}={content.get(name)!r}: expected {expected}.")
        rows = []
        for number, fields in enumerate(content["rows"], start=1):
            try:
                rows.append(ReportedRow.from_dict(fields))
            except ValueError as error:
                raise ValueError(f"measured={path}: row {number} of {len(content['rows'])}: {error}") from error
        return cls(source=content["source"], device_kind=content["device_kind"], rows=tuple(rows))
