from pathlib import Path

import pytest

from offline_tpu.dump import UNKNOWN_TRIPS, Dump
from offline_tpu.integers import Integers
from offline_tpu.machine import devices
from offline_tpu.machine.constants import core_timing
from offline_tpu.schedule.read import Schedule

HLO = """HloModule jit_f, is_scheduled=true

ENTRY %main (steps: s32[1], x: f32[16,128]) -> f32[16,128] {
  %steps = s32[1]{0:T(128)} parameter(0)
  %x = f32[16,128]{1,0:T(8,128)} parameter(1)
  %sizes = s32[3]{0:T(128)} constant({3, 0, 13})
  %metadata = (s32[4]{0:T(128)}, s32[6]{0:T(128)}, s32[6]{0:T(128)}, s32[1]{0:T(128)}) custom-call(%sizes), \
custom_call_target="tpu_custom_call", metadata={op_name="ragged-dot-metadata"}
  %visits = s32[1]{0:T(128)} get-tuple-element(%metadata), index=3
  %ragged = f32[16,128]{1,0:T(8,128)} custom-call(%visits, %x), custom_call_target="tpu_custom_call"
  %steps_more = s32[1]{0:T(128)} add(%steps, %steps)
  %given = f32[16,128]{1,0:T(8,128)} custom-call(%steps, %ragged), custom_call_target="tpu_custom_call"
  ROOT %kernel.1 = f32[16,128]{1,0:T(8,128)} custom-call(%steps_more, %given), custom_call_target="tpu_custom_call"
}
"""
BUNDLES = """
     0   :  { %s9_s9 = inlined_call_operand.<no memory space> [shape: s32[1], index: 0, kind: input] }
   0x1 LB: > { %s2_s1 = sphi 0, %s3_s2 /* phi copy */ } /* Start region 2 */
   0x2   : > { %s3_s2 = sadd.s32 1, %s2_s1 }
   0x3   : > { %p1_p0 = scmp.ge.s32.totalorder %s3_s2, %s9_s9 /* loop exit test */ }
   0x4   : > { %10 = sbr.rel (!%p1_p0) target = $region2 }
   0x5   : > {}
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
"""
UTILIZATION = "== CAPACITY\nSALU\n2\n== UTILIZATION\n" + "1\n" * 9
KERNELS = ("ragged", "given", "kernel.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1-TLP-hlo.txt").write_text(HLO)
    (tmp_path / "1-TLP-04-vmem_report.html").write_text('DATA = {"hlo_breakdowns": {}};')
    for number, name in enumerate(KERNELS):
        (tmp_path / f"{number}-{name}-00-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
        (tmp_path / f"{number}-{name}-02-final_bundles.txt").write_text(BUNDLES)
    return tmp_path


def _schedule(folder: Path, name: str, found: Integers) -> Schedule:
    timing = core_timing(devices.by_name("v6e"))
    dump = Dump(folder, timing=timing, grid_sizes={}, archived=True, find_integers=lambda: found)
    schedule = dump.schedule("main", dump.module.op("main", name))
    assert schedule is not None
    return schedule


@pytest.mark.parametrize(
    ("name", "found", "trips"),
    [
        ("kernel.1", Integers(kernels={"kernel": {0: (7,)}}), 7),
        ("given", Integers(parameters={0: (5,)}), 5),
        ("ragged", Integers(), 5),  # tiles of 4 rows: 3 rows of the first, and 13 in all four
    ],
)
def test_loops_run_as_often_as_known_operands_say(folder: Path, name: str, found: Integers, trips: int) -> None:
    schedule = _schedule(folder, name, found)
    assert schedule.cycles == 1 + 8 * trips
    assert schedule.unresolved == ()


def test_trips_that_depend_on_unknown_operands_are_said(folder: Path) -> None:
    assert UNKNOWN_TRIPS in _schedule(folder, "kernel.1", Integers()).unresolved
