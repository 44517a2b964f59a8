"""Single figures of matmuls, copies and collectives, as their authors give them: times, rates and flags."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from tuning.trials.reported import Size, Text

#: Nor NaN; the most is more than any row has of anything.
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Milliseconds = Positive

#: How `method` tells what part of a wall time is not the device's.
_OVERHEAD = re.compile(r"about (\d+(?:\.\d+)?) ms of it overhead")

#: How the source of rows begins that AI-Hypercomputer/accelerator-microbenchmarks made. What follows its programs for
#: v7x set themselves (Ironwood/src/benchmark_{gemm,hbm,collectives}.py, commit 9a6567b), but for flags that change
#: nothing in a program of one op.
_AUTHORS, _IRONWOOD = "AI-Hypercomputer/", "TPU7x"
_IRONWOOD_P_STATE = 7
_IRONWOOD_OPTIONS = {
    "matmul": {
        "xla_tpu_enable_all_experimental_scheduler_features": "true",
        "xla_tpu_accumulate_into_mrb": "true",
        "xla_tpu_scoped_vmem_limit_kib": "65536",
        "xla_tpu_vmem_scavenging_mode": "NONE",
    },
    "copy": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "all_gather": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}


class Microbenchmark(msgspec.Struct, frozen=True, kw_only=True):
    """A row of a file of single figures, in the units of their authors."""

    device_kind: Text
    program: Text
    source: Text
    m: Size | None = None
    k: Size | None = None
    n: Size | None = None
    dtype: str = "bfloat16"
    blocks_m_k_n: str | None = None
    libtpu_args: str = ""
    bytes: Size | None = None
    elements: Size | None = None  # of what is gathered, as `output` says
    shape: tuple[Size, ...] | None = None
    topology: str | None = None
    input: str | None = None
    output: str | None = None
    transferred_gb: Positive | None = None
    time_ms: Milliseconds | None = None
    tflops_per_device: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    bandwidth_gb_s_per_core: Positive | None = None
    method: str | None = None
    note: str | None = None

    def fields(self, identifier: str) -> dict[str, Any]:
        """Return the fields of a MeasuredRow.

        Raises:
          ValueError: there is neither a time nor a rate, the time is all overhead, or a flag has another form.
        """
        p_state = re.search(r"p_state (\d+)", self.note or "")
        is_ironwood = self.source.startswith(_AUTHORS) and self.device_kind == _IRONWOOD
        return {
            "id": identifier,
            "source": self.source,
            "device_kind": self.device_kind,
            "op": self.op,
            "arguments": self.arguments,
            "times_ms": (self.time(),),
            "compiler_options": (_IRONWOOD_OPTIONS.get(self.op, {}) if is_ironwood else {}) | self._compiler_options(),
            "p_state": int(p_state[1]) if p_state else _IRONWOOD_P_STATE if is_ironwood else None,
            "notes": tuple(text for text in (self.method, self.note) if text),
        }

    def _compiler_options(self) -> dict[str, str]:
        found = [re.fullmatch(r"--(\w+)=(\S+)", text) for text in self.libtpu_args.split()]
        if not all(found):
            raise ValueError(f"libtpu_args={self.libtpu_args!r}: expected --NAME=VALUE, with spaces between several")
        return {option[1]: option[2] for option in found if option}

    @property
    def op(self) -> str:
        if self.program.startswith("pallas matmul"):
            return "pallas_matmul"
        return "psum" if self.program.startswith("psum") else self.program

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the sizes that the program has; where only its name says the slice, from there."""
        slice_name = re.search(r"\b(v\w+-\d+)", self.program)
        found = {name: getattr(self, name) for name in ("m", "k", "n", "bytes", "input", "output")}
        found["topology"] = self.topology or (slice_name[1] if slice_name else None)
        if self.op == "pallas_matmul":
            found["blocks"] = self.blocks_m_k_n
        if self.op in ("matmul", "pallas_matmul", "psum"):
            found["dtype"] = self.dtype
        found["shape"] = list(self.shape) if self.shape else None
        return {name: value for name, value in found.items() if value is not None}

    def time(self) -> float:
        """Return the milliseconds, from the rate where only that is published: each source says what it counts.

        Of a wall time, what its source tells to be overhead of the host is taken off: no prediction has it.
        """
        if self.time_ms is not None:
            overhead = _OVERHEAD.search(self.method or "")
            if (time_ms := self.time_ms - (float(overhead[1]) if overhead else 0.0)) <= 0:
                raise ValueError(f"time_ms={self.time_ms:g}: expected more than the overhead that `method` tells")
            return time_ms
        if self.tflops_per_device and self.m and self.k and self.n:
            return 2 * self.m * self.k * self.n / self.tflops_per_device / 1e9
        bandwidth = self.bandwidth_gb_s_per_core or self.bandwidth_gb_s
        if bandwidth and (moved := self._moved_bytes()):
            return moved / bandwidth / 1e6
        raise ValueError("expected time_ms, tflops_per_device with m, k and n, or a bandwidth with what was moved")

    def _moved_bytes(self) -> float | None:
        if self.transferred_gb:
            return self.transferred_gb * 1e9
        if self.op == "copy" and self.bytes:
            return 2 * self.bytes  # read and written
        if self.op == "psum" and self.shape and (chips := re.search(r"-(\d+)\b", self.program)):
            # As a reduce-scatter and an all-gather: all but one's own part, twice.
            size = math.prod(self.shape) * (4 if self.dtype == "float32" else 2)
            return 2 * size * (int(chips[1]) - 1) / int(chips[1])
        return None


class MicrobenchmarkFile(msgspec.Struct, frozen=True):
    """A file of such rows."""

    rows: Annotated[tuple[Microbenchmark, ...], msgspec.Meta(min_length=1)]

    def measured(self, stem: str) -> Iterator[dict[str, Any]]:
        """Return each row's `Microbenchmark.fields`; its id is the stem and its number."""
        for number, row in enumerate(self.rows):
            try:
                yield row.fields(f"{stem}-{number:04d}")
            except ValueError as error:
                raise ValueError(f"{error} - at `$.rows[{number}]`") from error
