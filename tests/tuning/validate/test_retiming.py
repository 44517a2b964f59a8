"""Programs timed again at other constants take what they would take if their schedules were run at these."""

import dataclasses
from pathlib import Path

import pytest

import offline_tpu
import tiny_dumps
from offline_tpu.machine import constants, devices
from offline_tpu.machine.constants import FittedConstants
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.schedule.bundles import Program
from offline_tpu.schedule.execute import execute
from tuning.validate.fit.retiming import KeptProgram

V7X = devices.by_name("v7x")
IN_USE = FittedConstants.of(V7X)


def predicted_s(path: Path, device: DeviceSpec) -> float:
    return offline_tpu.predict(lambda: None, device=device, kept=path).time_s


@pytest.mark.parametrize(
    "program", [{}, {"ops": 3, "memory": "smem"}, {"granules": 70_001, "beside": 997, "after": 11}]
)
def test_timing_again_is_predicting_at_those_constants(
    program: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_dumps.keep(tmp_path / "a.tar.gz", **program)
    kept = KeptProgram(path, V7X)
    assert kept.time_s(V7X, IN_USE) == predicted_s(path, V7X)
    other = FittedConstants(0.7, dma_latency_s=2e-6, vmem_bytes_per_stolen_cycle=500.0, op_overhead_s=1e-6)
    faster = dataclasses.replace(V7X, clock_hz=2.3e9)
    actual = kept.time_s(faster, other)
    assert actual != kept.time_s(V7X, IN_USE)
    monkeypatch.setattr(constants.FittedConstants, "of", lambda device: other)
    assert actual == pytest.approx(predicted_s(path, faster), rel=1e-12)


def test_recorded_calls_replay_to_the_same_cycles(tmp_path: Path) -> None:
    tiny_dumps.keep(tmp_path / "a.tar.gz", granules=911, beside=13)
    program = Program((tmp_path / "a.tar.dump" / "1-x.1-02-final_bundles.txt").read_text())
    timing = IN_USE.core_timing(V7X)
    execution = execute(program, timing, record=True)
    assert execution.recording is not None
    assert execute(program, timing).recording is None
    for other in (timing, dataclasses.replace(timing, bytes_per_cycle=3.0, latency_cycles=11.0)):
        run = execute(program, other)
        assert execution.recording.stall_cycles(other) == pytest.approx(run.stall_cycles)
