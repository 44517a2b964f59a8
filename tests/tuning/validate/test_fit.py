"""Constants that were planted in the times of tiny programs are found again."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tiny_dumps
from offline_tpu.machine import devices
from offline_tpu.machine.constants import FittedConstants
from splash_workbench import provenance
from splash_workbench.workers.cache import JobCache
from tuning.validate.fit import __main__ as fit
from tuning.validate.fit import sensitivity
from tuning.validate.fit.fitting import FitRow, Fitted
from tuning.validate.fit.retiming import KeptProgram
from tuning.validate.rows import MeasuredRow
from tuning.validate.run import compiler_of, dump_path

PROGRAMS: dict[str, dict[str, Any]] = {
    "calls": {"ops": 3, "granules": 64},
    "waits": {"ops": 1, "granules": 1009},
    "hides": {"ops": 5, "granules": 64, "beside": 2003},
    "streams": {"granules": 3_000_017, "memory": "smem"},
    "fills": {"granules": 3_000_017, "memory": "vmem"},
    "computes": {"granules": 211, "beside": 9001, "after": 9001},
}
PLANTED = {
    "hbm_efficiency v6e": 0.97,
    "hbm_efficiency v7x": 1.02,
    "dma_latency_s": 0.9,
    "cycle_efficiency": 0.98,
    "vmem_bytes_per_stolen_cycle": 1.1,
    "op_overhead_s": 1.3,
    "hbm_sustained_share v6e": 1.0,  # no program here is so long
    "hbm_burst_s v6e": 1.0,
    "clock_hz v7x": 0.96,
}


@pytest.fixture
def rows(tmp_path: Path) -> list[FitRow]:
    found = []
    for chip in ("v6e", "v7x"):
        device = devices.by_name(chip)
        constants = FittedConstants(
            *(
                value * PLANTED[name]
                for name, value in sensitivity.parameters(device).items()
                if not name.startswith("clock")
            )
        )
        there = dataclasses.replace(device, clock_hz=device.clock_hz * PLANTED.get(f"clock_hz {chip}", 1.0))
        for op, program in PROGRAMS.items():
            path = tiny_dumps.keep(tmp_path / f"{op}-{chip}.tar.gz", **program)
            planted_ms = KeptProgram(path, device).time_s(there, constants) * 1e3
            read = sensitivity.of_dump(path, device)
            found.append(
                FitRow(
                    id=path.stem,
                    op=op,
                    device=chip,
                    log_ratio=math.log(read["time_ms"] / planted_ms),
                    sensitivities=read["sensitivities"],
                )
            )
    return found * 40  # as many as outweigh the prior


def in_use(*chips: str) -> dict[str, float]:
    return {name: value for chip in chips for name, value in sensitivity.parameters(devices.by_name(chip)).items()}


def test_planted_constants_are_found_again(rows: list[FitRow]) -> None:
    start = in_use("v6e", "v7x")
    fitted = Fitted.of("planted", rows, {}, start)
    actual = {name: value / start[name] for name, value in fitted.constants.items()}
    assert actual == pytest.approx(PLANTED, abs=0.03)
    for group in fitted.groups:
        assert group.fitted.worst < 0.01
    assert {left_out.op: left_out.row_count for left_out in fitted.programs} == dict.fromkeys(PROGRAMS, 80)


def test_rows_far_off_hardly_move_the_constants(rows: list[FitRow]) -> None:
    start = in_use("v6e", "v7x")
    off = [FitRow(id="off", op="off", device="v6e", log_ratio=1.1, sensitivities=row.sensitivities) for row in rows[:5]]
    with_them, without = (Fitted.of("planted", each, {}, start).constants for each in ([*rows, *off], rows))
    assert with_them == pytest.approx(without, rel=0.05)


def test_the_clock_of_a_p_state_that_a_row_names_is_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.CACHE_VARIABLE, str(tmp_path / "cache"))
    usual = MeasuredRow(id="row", source="", device_kind="TPU7x", op="computes", arguments={}, times_ms=(1.0,))
    faster = msgspec.structs.replace(usual, p_state=7)
    found = []
    for row in (usual, faster):
        tiny_dumps.keep(dump_path(tmp_path, row, compiler_of(row)), **PROGRAMS["computes"])
        found.append(fit._fit_row(row, tmp_path, JobCache.of_user(enabled=True), "sources"))
    assert ["clock_hz v7x" in row.sensitivities for row in found] == [True, False]
    clocks = devices.by_name("v7x").p_states
    assert found[0].log_ratio - found[1].log_ratio == pytest.approx(math.log(clocks[7] / clocks[3]), rel=0.1)


def test_rows_are_left_out_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def row(number: int, op: str = "streams", **more) -> MeasuredRow:
        arguments = {"number": number}
        return MeasuredRow(
            id=f"row-{number}", source="", device_kind="TPU7x", op=op, arguments=arguments, times_ms=(1.0,), **more
        )

    chosen = [row(0), row(1, p_state=7), row(2, op="psum"), row(3), row(4)]
    tiny_dumps.keep(dump_path(tmp_path / "dumps", chosen[0], compiler_of(chosen[0])))
    dump_path(tmp_path / "dumps", chosen[4], compiler_of(chosen[4])).write_bytes(b"torn")
    monkeypatch.setattr(fit, "read_shipped", lambda: chosen)
    monkeypatch.setenv(provenance.CACHE_VARIABLE, str(tmp_path / "cache"))
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["fit", str(tmp_path / "dumps"), "--set", "all", "--output", str(output)])
    assert fit.main() == 0
    found = json.loads((output / "fit.json").read_text())
    assert [each["id"] for each in found["rows"]] == ["row-0"]
    assert sorted(found["without"].values()) == [1, 1, 2]
    printed = capsys.readouterr().out
    assert "2 rows: no dump is kept" in printed
    assert "| streams | v7x | 1 |" in (output / "fit.md").read_text()
