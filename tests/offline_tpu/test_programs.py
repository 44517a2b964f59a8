"""Programs with known answers, compiled by libtpu for a v6e that is not here, in one process for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S
from offline_tpu.machine.constants import DMA_LATENCY_S, HBM_EFFICIENCY, ICI_EFFICIENCY
from offline_tpu.prediction import OpCost
from offline_tpu.timeline import unrolled
from splash_workbench.provenance import REPO_ROOT
from splash_workbench.records import jsonl

pytestmark = pytest.mark.compile

NAMES = (
    "matmul small_matmul small_matmul_with_less_vmem copy repeated scan data_dependent_loop named_loop "  # noqa: SIM905
    "conditional one_matmul two_matmuls two_branches nested_loops unrolled_loop fixed_branch data_dependent_branch "
    "traced_grid named_traced_grid longer_traced_grid all_reduce all_to_all all_to_all_of_eight scan_in_shard_map "
    "rows_of_half_a_lane rows_as_the_kernel_has_them "
    "tensor_parallel".split()
)
STEPS, HEAVY_STEPS, TRIPS = 8, 3, 42
HBM_BYTES_PER_S, LINK_BYTES_PER_S = 1638e9, 100e9
FLOPS_PER_CYCLE = 524288  # 918 TFLOP/s at 1.75 GHz


def predict(*names: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO_ROOT), str(Path(__file__).parent)])}
    command = [sys.executable, "-m", "programs", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PLENTY_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def predictions() -> dict[str, Any]:
    return predict(*NAMES)


@pytest.fixture
def op(predictions: dict[str, Any]) -> Any:
    """(program, text) -> the one op of that program whose name contains the text."""

    def find(program: str, text: str) -> dict[str, Any]:
        found = [o for o in predictions[program]["ops"] if text in o["name"]]
        assert len(found) == 1, [o["name"] for o in predictions[program]["ops"]]
        return found[0]

    return find


def executed_matmuls(op: dict[str, Any]) -> float:
    """Executed slots of the matrix unit, in the unit of `one_matmul`."""
    return op["utilization"]["MATMUL"] * op["cycles"]


def test_compiler_options_reach_the_compiler_and_are_kept(predictions: dict[str, Any], op: Any) -> None:
    assert predictions["small_matmul"]["compiler_options"] == {}
    assert predictions["small_matmul_with_less_vmem"]["compiler_options"] == {"xla_tpu_scoped_vmem_limit_kib": "2048"}
    assert op("small_matmul_with_less_vmem", "fusion")["vmem_bytes"] != op("small_matmul", "fusion")["vmem_bytes"]


def test_a_big_matmul_takes_the_cycles_of_its_flops(op: Any) -> None:
    actual = op("matmul", "fusion")
    expected = 2 * 4096**3 / FLOPS_PER_CYCLE
    assert actual["bound"] == "compute"
    assert actual["category"] == "matmul"
    assert expected <= actual["cycles"] <= 1.05 * expected
    assert executed_matmuls(actual) == pytest.approx(expected, rel=2e-3)


def test_a_copy_reads_and_writes_each_byte_once(op: Any) -> None:
    actual = op("copy", "copy")
    expected = 2 * 2 * 8192**2
    assert actual["hbm_bytes"] == expected
    assert actual["bound"] == "hbm"
    assert actual["category"] == "layout"
    assert actual["time_s"] == pytest.approx(expected / (HBM_EFFICIENCY["v6e"] * HBM_BYTES_PER_S), rel=0.02)


def test_layouts_of_the_compilers_choice_leave_a_kernel_without_copies(predictions: dict[str, Any], op: Any) -> None:
    copied, alone = predictions["rows_of_half_a_lane"], predictions["rows_as_the_kernel_has_them"]
    assert any("copy" in o["name"] for o in copied["ops"])
    assert [o["name"].split(".")[0] for o in alone["ops"]] == ["double"]
    assert op("rows_as_the_kernel_has_them", "double")["hbm_bytes"] == 2 * 8192 * 128 * 4  # lanes are whole there


def test_ops_that_share_one_program_are_all_counted(predictions: dict[str, Any]) -> None:
    matmuls = [o for o in predictions["repeated"]["ops"] if o["category"] == "matmul"]
    assert len(matmuls) == 4  # of one layer, two, two and one
    assert len({o["cycles"] for o in matmuls}) < len(matmuls)
    assert sum(map(executed_matmuls, matmuls)) == pytest.approx(6 * 2 * 1024**3 / FLOPS_PER_CYCLE, rel=0.01)


def test_a_scan_runs_its_body_as_often_as_its_counter_says(op: Any) -> None:
    actual = op("scan", "tanh")
    assert actual["calls"] == TRIPS
    assert actual["unresolved"] == []


def test_trips_that_depend_on_data_are_counted_once_and_said(op: Any) -> None:
    actual = op("data_dependent_loop", "tanh")
    assert actual["calls"] == 1
    assert "trips of the loop" in actual["unresolved"][0]


def test_trips_that_depend_on_data_can_be_named(op: Any) -> None:
    actual = op("named_loop", "tanh")
    assert actual["calls"] == TRIPS
    assert actual["unresolved"] == []


def test_the_slowest_branch_of_a_conditional_is_counted_and_said(op: Any) -> None:
    actual = op("conditional", "sin")
    assert "which of 2 branches" in actual["unresolved"][0]


def test_regions_of_a_kernel_are_weighed_by_how_often_they_run(op: Any) -> None:
    one, two = (executed_matmuls(op(name, "kernel")) for name in ("one_matmul", "two_matmuls"))
    actual = op("two_branches", "kernel")
    assert executed_matmuls(actual) == pytest.approx(HEAVY_STEPS * one + (STEPS - HEAVY_STEPS) * two, rel=1e-3)
    assert actual["unresolved"] == []


def test_nested_loops_multiply(op: Any) -> None:
    one = executed_matmuls(op("one_matmul", "kernel"))
    assert executed_matmuls(op("nested_loops", "kernel")) == pytest.approx(STEPS * 3 * 5 * one, rel=1e-3)


def test_an_unrolled_loop_runs_half_the_trips_of_twice_the_body(op: Any) -> None:
    two = executed_matmuls(op("two_matmuls", "kernel"))
    assert executed_matmuls(op("unrolled_loop", "kernel")) == pytest.approx(STEPS * 10 / 2 * two, rel=1e-3)


def test_a_branch_on_a_constant_that_is_prefetched_is_followed(op: Any) -> None:
    one = executed_matmuls(op("one_matmul", "kernel"))
    actual = op("fixed_branch", "kernel")
    assert executed_matmuls(actual) == pytest.approx(3 * one, rel=1e-3)
    assert actual["unresolved"] == []


def test_a_branch_on_data_is_counted_as_run_and_said(op: Any) -> None:
    one = executed_matmuls(op("one_matmul", "kernel"))
    actual = op("data_dependent_branch", "kernel")
    assert executed_matmuls(actual) == pytest.approx(STEPS * one, rel=1e-3)
    assert any(text.startswith("branch at ") for text in actual["unresolved"])


def test_a_traced_grid_size_can_be_named(op: Any) -> None:
    one = executed_matmuls(op("one_matmul", "kernel"))
    actual = op("named_traced_grid", "traced")
    assert executed_matmuls(actual) == pytest.approx(STEPS * one, rel=1e-3)
    assert actual["unresolved"] == []


def test_time_at_the_other_end_of_what_depends_on_data(predictions: dict[str, Any]) -> None:
    named, longer = predictions["named_traced_grid"], predictions["longer_traced_grid"]
    assert named["slow_time_s"] == longer["time_s"] > named["time_s"]
    assert predictions["traced_grid"]["slow_time_s"] is None


def test_a_traced_grid_size_that_is_not_named_is_said(op: Any) -> None:
    assert any(text.startswith("branch at ") for text in op("traced_grid", "traced")["unresolved"])


def test_all_reduce_over_the_slice(predictions: dict[str, Any]) -> None:
    (actual,) = [o for o in predictions["all_reduce"]["ops"] if o["collective"]]
    size = 4096 * 4096 * 2
    # Reduce-scatter and all-gather; on a 2 x 4 mesh without wraparound a chip sends on one link an axis.
    link_bytes = 2 * size * (7 / 8) / 2
    assert actual["collective"]["kind"] == "all-reduce"
    assert actual["collective"]["size_bytes"] == size
    assert actual["collective"]["group_size"] == 8
    assert actual["collective"]["link_bytes"] == pytest.approx(link_bytes)
    assert actual["hbm_bytes"] == 2 * size
    assert actual["bound"] == "link"
    assert actual["time_s"] == pytest.approx(link_bytes / (ICI_EFFICIENCY * LINK_BYTES_PER_S), rel=0.05)


def test_all_to_all_over_four_chips(predictions: dict[str, Any]) -> None:
    (actual,) = [o for o in predictions["all_to_all"]["ops"] if o["collective"]]
    size = 4096 * 2048 * 2
    assert actual["collective"]["kind"] == "all-to-all"
    assert actual["collective"]["size_bytes"] == size
    assert (actual["collective"]["group_size"], actual["collective"]["group_count"]) == (4, 2)
    # The four chips are a 2 x 2 block: half of what a chip sends crosses each axis.
    assert actual["collective"]["link_bytes"] == pytest.approx(size / 2)


def test_all_to_all_over_the_slice(predictions: dict[str, Any]) -> None:
    (actual,) = [o for o in predictions["all_to_all_of_eight"]["ops"] if o["collective"]]
    size = 8192 * 1024 * 2
    assert actual["collective"]["kind"] == "all-to-all"
    assert actual["collective"]["size_bytes"] == size
    assert (actual["collective"]["group_size"], actual["collective"]["group_count"]) == (8, 1)
    # Four chips to either side of the middle of the 2 x 4 grid: each sends half of its data over, on two links.
    link_bytes = 4 * size / 2 / 2
    assert actual["collective"]["link_bytes"] == pytest.approx(link_bytes)
    assert actual["bound"] == "link"
    assert actual["time_s"] == pytest.approx(link_bytes / (ICI_EFFICIENCY * LINK_BYTES_PER_S), rel=0.05)


def test_a_scan_inside_shard_map_runs_and_communicates_in_every_trip(predictions: dict[str, Any]) -> None:
    ops = predictions["scan_in_shard_map"]["ops"]
    (reduce,) = [o for o in ops if o["collective"]]
    matmuls = [o for o in ops if o["category"] == "matmul"]
    assert reduce["calls"] == TRIPS
    assert (reduce["collective"]["kind"], reduce["collective"]["group_size"]) == ("all-reduce", 4)
    assert reduce["collective"]["size_bytes"] == 1024 * 1024 * 2
    (body,) = matmuls
    assert body["calls"] == TRIPS
    # Half of the rows are on a chip: the body of `scan`, whose matmul is as large.
    (same,) = [o for o in predictions["scan"]["ops"] if o["category"] == "matmul"]
    assert executed_matmuls(body) == executed_matmuls(same) == pytest.approx(2 * 1024**3 / FLOPS_PER_CYCLE, rel=0.02)
    assert all(o["unresolved"] == [] for o in ops)


def test_a_sharded_program_pays_for_its_collective_in_every_trip(predictions: dict[str, Any]) -> None:
    ops = predictions["tensor_parallel"]["ops"]
    (reduce,) = [o for o in ops if o["collective"]]
    matmuls = [o for o in ops if o["category"] == "matmul"]
    assert reduce["calls"] == 4
    assert reduce["collective"]["size_bytes"] == 4096 * 1024 * 2
    flops = 2 * 2 * 4096 * 1024 * 1024
    assert sum(executed_matmuls(o) * o["calls"] for o in matmuls) == pytest.approx(
        4 * flops / FLOPS_PER_CYCLE, rel=0.01
    )
    assert all("mlp" in o["scope"] for o in matmuls)
    total = predictions["tensor_parallel"]["time_s"]
    assert total == pytest.approx(sum(o["time_s"] for o in ops))


@pytest.mark.parametrize("program", ["scan", "nested_loops", "unrolled_loop", "two_branches", "tensor_parallel"])
def test_the_timeline_of_a_prediction_has_its_time_without_gaps(predictions: dict[str, Any], program: str) -> None:
    runs = unrolled(jsonl.decode(op, OpCost) for op in predictions[program]["ops"])
    now = 0.0
    for _, start_s, time_s in runs:
        assert start_s == pytest.approx(now, abs=1e-12)
        now = start_s + time_s
    assert now == pytest.approx(predictions[program]["time_s"])
    assert len(runs) == sum(op["calls"] for op in predictions[program]["ops"])


@pytest.mark.slow("3 min")
def test_a_loop_longer_than_instruction_memory_loads_its_code_in_every_trip() -> None:
    shorter, longer = (
        next(o for o in program["ops"] if "growing" in o["name"])
        for program in predict("loop_of_64720_bundles", "loop_of_72080_bundles").values()
    )
    assert shorter["code_bytes"] == 64720 * 64
    assert (shorter["code_load_s"], shorter["unresolved"]) == (0, [])
    assert longer["code_bytes"] == 72080 * 64
    assert longer["code_load_s"] == pytest.approx(
        STEPS * (72176 * 64 / (HBM_EFFICIENCY["v6e"] * HBM_BYTES_PER_S) + 5 * DMA_LATENCY_S)
    )
    assert longer["unresolved"][0].startswith("its loop spans 5 pieces of code")
