"""Predicted timelines: loops unrolled, and read back by this project's reader and by TensorBoard's own."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from offline_tpu.machine.devices import by_name
from offline_tpu.prediction import Loop, OpCost
from offline_tpu.timeline import Program, space_of, unrolled
from splash_workbench.profiles import reader
from splash_workbench.records import jsonl

V6E = by_name("v6e")


def op(name: str, start_s: float, time_s: float, *loops: Loop, **more) -> OpCost:
    """time_s: of one call."""
    calls = math.prod(loop.trips for loop in loops)
    return OpCost(name, more.pop("scope", ""), "matmul", time_s * calls, start_s, calls, loops=loops, **more)


def runs(*ops: OpCost) -> list[tuple[str, float, float]]:
    return [(found.name, start, time) for found, start, time in unrolled(ops)]


def test_a_loop_is_unrolled():
    loop = Loop(trips=3, period_s=4)
    ops = op("a", 0, 2), op("b", 2, 3, loop), op("c", 5, 1, loop), op("d", 14, 1)
    assert runs(*ops) == [
        ("a", 0, 2),
        ("b", 2, 3),
        ("c", 5, 1),
        ("b", 6, 3),
        ("c", 9, 1),
        ("b", 10, 3),
        ("c", 13, 1),
        ("d", 14, 1),
    ]


def test_nested_loops():
    outer, inner = Loop(trips=2, period_s=6), Loop(trips=3, period_s=1)
    ops = op("a", 0, 1, outer), op("b", 1, 1, outer, inner), op("c", 4, 2, outer)
    assert [(name, start) for name, start, _ in runs(*ops)] == [
        ("a", 0),
        ("b", 1),
        ("b", 2),
        ("b", 3),
        ("c", 4),
        ("a", 6),
        ("b", 7),
        ("b", 8),
        ("b", 9),
        ("c", 10),
    ]


def test_ops_that_never_run_are_left_out():
    assert runs(op("never", 0, 0, Loop(trips=0, period_s=1)), op("a", 0, 1)) == [("a", 0, 1)]


def test_an_op_comes_back_from_a_record():
    expected = op("a", 1, 2, Loop(trips=3, period_s=4), unresolved=("branch",), utilization={"MATMUL": 0.5})
    assert jsonl.decode(json.loads(json.dumps(dataclasses.asdict(expected))), OpCost) == expected


def test_a_record_that_does_not_say_its_loops_is_refused():
    fields = {"name": "a", "scope": "", "category": "matmul", "time_s": 3.0, "start_s": 0.0, "calls": 3}
    assert len(list(unrolled([jsonl.decode(fields | {"calls": 1}, OpCost)]))) == 1
    with pytest.raises(ValueError, match="op a: its loops are not in the record; predict again"):
        list(unrolled([jsonl.decode(fields, OpCost)]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    loop = Loop(trips=3, period_s=3e-3)
    kernel = op(
        "kernel.1",
        1e-3,
        2e-3,
        loop,
        scope="jit(step)/denoise/blocks/while/body/attention/pallas_call",
        cycles=3_500_000,
        hbm_bytes=10**9,
        utilization={"MATMUL": 0.5},
        bound="compute",
    )
    copy = op("copy.2", 3e-3, 1e-3, loop, scope="jit(step)/denoise/blocks/while/body/norm1/mul", hbm_bytes=10**6)
    first = Program("step", (op("embed.3", 0, 1e-3, scope="jit(step)/denoise/embed/dot_general"), kernel, copy))
    path = tmp_path / f"predicted{reader.SUFFIX}"
    path.write_bytes(
        space_of([first, Program("second", (op("fusion.9", 0, 1e-3),))], V6E, "libtpu 1.2.3").SerializeToString()
    )
    return path


def test_the_reader_finds_what_was_predicted(path):
    profile = reader.read(path)
    assert profile.predicted and profile.on_device and profile.host == "predicted"
    assert [(found.name, found.duration_ps) for found in profile.ops[:3]] == [
        ("embed.3", 10**9),
        ("kernel.1", 2 * 10**9),
        ("copy.2", 10**9),
    ]
    assert profile.seconds_by_scope() == {
        "denoise/blocks/attention": pytest.approx(6e-3),
        "denoise/blocks/norm1": pytest.approx(3e-3),
        "denoise/embed": pytest.approx(1e-3),
        "": pytest.approx(1e-3),
    }
    assert [step.duration_ps for step in profile.steps] == [10**10, 10**9]
    assert [len(ops) for _, ops in profile.ops_by_step()] == [7, 1]
    assert next((run.program, run.duration_ps) for run in profile.modules) == ("predicted-step", 10**10)


def test_tensorboards_tools_fill_and_say_that_it_was_predicted(path):
    tools = pytest.importorskip("xprof.convert.raw_to_tool_data")
    data = {
        tool: json.loads(tools.xspace_to_tool_data([str(path)], tool, {})[0])
        for tool in ("hlo_stats", "op_profile", "roofline_model", "overview_page")
    }
    table = data["hlo_stats"]
    names = [column["id"] for column in table["cols"]]
    rows = [dict(zip(names, (cell["v"] for cell in row["c"]), strict=True)) for row in table["rows"]]
    kernel = next(row for row in rows if row["hlo_op_name"] == "kernel.1")
    assert kernel["occurrences"] == 3
    assert kernel["total_self_time"] == pytest.approx(6000)  # microseconds
    assert "denoise/blocks/while/body/attention" in kernel["tf_op_name"]
    # Half of the MXU's slots over all cycles of 2 ms is half of the peak; 1 GB in 2 ms.
    assert kernel["normalized_flop_rate"] == pytest.approx(918e3 / 2)
    assert kernel["hbm_bw"] == pytest.approx(500e9 / 2**30)
    assert data["roofline_model"][0]["p"]["device_type"] == "TPU v6 lite (predicted by libtpu 1.2.3)"
    assert float(data["roofline_model"][0]["p"]["peak_flop_rate"]) == pytest.approx(918e3)
    metrics = data["op_profile"]["byProgram"]["metrics"]
    assert metrics["flops"] == pytest.approx(0.5 * 6 / 11)
    steps = next(table["p"] for table in data["overview_page"] if "steptime_ms_maximum" in table.get("p", {}))
    assert float(steps["steptime_ms_maximum"]) == pytest.approx(10)


def test_scopes_are_a_line_of_their_own(path):
    space = reader.parse(path)
    (plane,) = space.planes
    line = next(line for line in plane.lines if line.name == "Framework Name Scope")
    names = [plane.event_metadata[event.metadata_id].name for event in line.events]
    assert names == ["denoise", "embed", "blocks", *["attention", "norm1"] * 3]
    assert [event.duration_ps for event in line.events][:3] == [10**10, 10**9, 9 * 10**9]
