"""Predicted timelines: loops unrolled, and read back by this project's reader and by TensorBoard's own."""

import json
from pathlib import Path

import pytest

from offline_tpu.machine.devices import by_name
from offline_tpu.timeline import PredictedOp, Program, space_of, unrolled
from splash_workbench.profiles import reader

V6E = by_name("v6e")


def op(name: str, start_s: float, time_s: float, calls: int = 1, **more) -> PredictedOp:
    return PredictedOp(
        name=name, scope=more.pop("scope", ""), category="matmul", time_s=time_s, start_s=start_s, calls=calls, **more
    )


def runs(*ops: PredictedOp) -> list[tuple[str, float, float]]:
    return [(found.name, pytest.approx(start), pytest.approx(time)) for found, start, time in unrolled(ops)]


def test_a_loop_is_unrolled():
    ops = op("a", 0, 2), op("b", 2, 9, 3), op("c", 5, 3, 3), op("d", 14, 1)
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


def test_two_loops_in_a_row_are_told_apart_by_their_starts():
    one_after_the_other = op("b", 0, 6, 3), op("c", 6, 3, 3)
    assert [name for name, *_ in runs(*one_after_the_other)] == ["b", "b", "b", "c", "c", "c"]
    in_one = op("b", 0, 6, 3), op("c", 2, 3, 3)
    assert [name for name, *_ in runs(*in_one)] == ["b", "c", "b", "c", "b", "c"]


def test_nested_loops():
    ops = op("a", 0, 2, 2), op("b", 1, 6, 6), op("c", 4, 4, 2)  # twice: a, three times b, c
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


def test_a_loop_of_two_ops_within_a_loop_of_two_ops():
    # Twice: three times a (1 s) and b (2 s), then c (4 s); then d, then twice e.
    ops = op("a", 0, 6, 6), op("b", 1, 12, 6), op("c", 9, 8, 2), op("d", 26, 1), op("e", 27, 2, 2)
    expected = ["a", "b", "a", "b", "a", "b", "c"] * 2 + ["d", "e", "e"]
    found = list(unrolled(ops))
    assert [run.name for run, *_ in found] == expected
    now = 0.0
    for _, start_s, time_s in found:
        assert start_s == pytest.approx(now)
        now += time_s
    assert now == pytest.approx(29)


def test_an_inner_loop_at_the_end_of_an_outer_one_before_another_loop():
    # Twice: a, then three times b; then as often as that c.
    ops = op("a", 0, 2, 2), op("b", 1, 6, 6), op("c", 8, 6, 6)
    assert [run.name for run, *_ in unrolled(ops)] == ["a", "b", "b", "b"] * 2 + ["c"] * 6


def test_a_gap_is_an_error():
    with pytest.raises(ValueError, match=r"b: starts at 5 s; expected 1\.0 s"):
        list(unrolled([op("a", 0, 1), op("b", 5, 1)]))


def test_ops_that_never_run_are_left_out():
    assert runs(op("never", 0, 0, 0), op("a", 0, 1)) == [("a", 0, 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    kernel = op(
        "kernel.1",
        1e-3,
        6e-3,
        3,
        scope="jit(step)/denoise/blocks/while/body/attention/pallas_call",
        cycles=3_500_000,
        hbm_bytes=10**9,
        utilization={"MATMUL": 0.5},
        bound="compute",
    )
    copy = op("copy.2", 3e-3, 3e-3, 3, scope="jit(step)/denoise/blocks/while/body/norm1/mul", hbm_bytes=10**6)
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
    assert profile.module_seconds("predicted-step") == [0.01]


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
