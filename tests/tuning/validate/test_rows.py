import json
import math
from pathlib import Path
from typing import Any

import pytest

from tuning.trials.reported import DEFAULT_PATH
from tuning.validate import rows
from tuning.validate.rows import SPLASH, read, read_shipped

NAN, INF = math.nan, math.inf  # which Python's JSON has
OP_ROW = {
    "arguments": {"x": "bf16[384,64]", "axis": -1, "offset": None},
    "config": {"tile_m": 8},
    "times_ms": [2, 9, 3],
}
OP_FILE = {"source": "made up for a test", "device_kind": "TPU v6 lite", "op": "normalization", "rows": [OP_ROW]}
MATMUL = {"device_kind": "TPU7x", "program": "matmul", "source": "made up", "m": 1000, "k": 2000, "n": 3000}


def _file(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def _micro(tmp_path: Path, **row: Any) -> rows.MeasuredRow:
    (found,) = read(_file(tmp_path / "micro.json", {"rows": [MATMUL | row]}))
    return found


def test_what_is_shipped_is_read_and_has_ids() -> None:
    shipped = {row.id: row for row in read_shipped()}
    assert len(shipped) == 1898 + 22 + 12
    assert shipped["tpu7x-ragged_dot-0034"].op == "ragged_dot"
    assert {row.device_kind for row in shipped.values()} == {"TPU v6 lite", "TPU v5 lite", "TPU7x", "TPU v5"}
    assert all(row.source for row in shipped.values())


def test_a_row_of_an_op(tmp_path: Path) -> None:
    (row,) = read(_file(tmp_path / "mine.json", OP_FILE))
    assert (row.id, row.op, row.device_kind, row.time_ms) == ("mine-0000", "normalization", "TPU v6 lite", 3.0)
    assert (row.shape, row.settings) == ("x=bf16[384,64] axis=-1", "tile_m=8")
    assert "times_ms" not in row.call and "id" not in row.call


def test_a_row_may_say_more_than_its_file(tmp_path: Path) -> None:
    own = {"op": "copy", "device_kind": "TPU7x", "id": "mine", "p_state": 7, "compiler_options": {"xla_a": "1"}}
    first, second = read(_file(tmp_path / "x.json", OP_FILE | {"rows": [OP_ROW | own, OP_ROW]}))
    assert (first.op, first.device_kind, first.id, first.source) == ("copy", "TPU7x", "mine", "made up for a test")
    assert first.settings == "tile_m=8 xla_a=1 p_state=7"
    assert (second.op, second.id) == ("normalization", "x-0001")


def test_a_folder_is_all_of_its_files(tmp_path: Path) -> None:
    _file(tmp_path / "b.json", OP_FILE)
    _file(tmp_path / "a.json", {"rows": [MATMUL | {"time_ms": 1.0}]})
    (tmp_path / "README.md").write_text("no rows")
    assert [row.id for row in read(tmp_path)] == ["a-0000", "b-0000"]


def test_files_without_rows_in_a_folder_are_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _file(tmp_path / "b.json", OP_FILE)
    _file(tmp_path / "none.json", OP_FILE | {"rows": []})
    _file(tmp_path / "package.json", {"name": "something else"})
    assert [row.id for row in read(tmp_path)] == ["b-0000"]
    assert caplog.text.count("left out, it has no rows") == 2
    (tmp_path / "b.json").unlink()
    with pytest.raises(ValueError, match=r"none\.json: .*length >= 1"):
        read(tmp_path)


def test_rows_of_splash_keep_their_short_texts() -> None:
    first = read(DEFAULT_PATH)[0]
    assert (first.op, first.shape, first.settings) == (SPLASH, "32x512x32x64", "512/512/512 sss lp")
    assert first.splash.block_q == 512


@pytest.mark.parametrize(
    ("row", "time_ms"),
    [
        ({"time_ms": 1.5}, 1.5),
        ({"time_ms": 1.5, "method": "wall clock: an upper bound, about 0.1 ms of it overhead"}, 1.4),
        ({"tflops_per_device": 1.2}, 10.0),
        ({"program": "copy", "bytes": 10**6, "bandwidth_gb_s_per_core": 1.0}, 2.0),  # read and written
        ({"program": "all_gather", "transferred_gb": 0.5, "bandwidth_gb_s": 100.0}, 5.0),
        ({"program": "psum over the chips (v6e-4)", "shape": [1000, 1000], "bandwidth_gb_s": 3.0}, 1.0),
    ],
)
def test_times_of_microbenchmarks_come_from_their_rates(tmp_path: Path, row: dict[str, Any], time_ms: float) -> None:
    assert _micro(tmp_path, **row).time_ms == pytest.approx(time_ms)


def test_flags_and_power_state_of_microbenchmarks(tmp_path: Path) -> None:
    flags = "--xla_tpu_scoped_vmem_limit_kib=65536 --xla_tpu_rwb_fusion=false"
    row = _micro(tmp_path, time_ms=1.0, libtpu_args=flags, note="dvfs p_state 7 by libtpu flag")
    assert row.compiler_options == {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_tpu_rwb_fusion": "false"}
    assert row.p_state == 7
    theirs = _micro(tmp_path, time_ms=1.0, source="AI-Hypercomputer/tpu-recipes, ironwood/README.md", libtpu_args=flags)
    assert (theirs.p_state, len(theirs.compiler_options)) == (7, 5)  # what the benchmark sets, and what the row says
    psum = _micro(tmp_path, program="psum over the slice (v6e-256)", shape=[4, 4], bandwidth_gb_s=1.0)
    assert (psum.op, psum.arguments["topology"]) == ("psum", "v6e-256")


def test_a_wall_time_that_is_all_overhead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"time_ms=0.1: expected more than the overhead .* - at `\$.rows\[0\]`"):
        _micro(tmp_path, time_ms=0.1, method="about 0.1 ms of it overhead")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with `rows`"),
        ({"rows": 3}, "expected an object with `rows`"),
        (OP_FILE | {"rows": []}, "Expected `array` of length >= 1 - at `$.rows`"),
        (OP_FILE | {"op": None}, "expected `op`, of the file or of the row - at `$.rows[0]`"),
        (OP_FILE | {"rows": [OP_ROW | {"times_ms": []}]}, "Expected `array` of length >= 1 - at `$.rows[0].times_ms`"),
        (OP_FILE | {"rows": [OP_ROW | {"times_ms": [0]}]}, "Expected `float` > 0.0 - at `$.rows[0].times_ms[0]`"),
        (OP_FILE | {"rows": [OP_ROW | {"times_ms": [NAN]}]}, "Expected `float` > 0.0 - at `$.rows[0].times_ms[0]`"),
        (
            OP_FILE | {"rows": [OP_ROW | {"times_ms": [1, INF]}]},
            "Expected `float` <= 1000000000000.0 - at `$.rows[0].times_ms[1]`",
        ),
        (
            OP_FILE | {"rows": [OP_ROW | {"peak_memory_mb": INF}]},
            "Expected `float` <= 1000000000000.0 - at `$.rows[0].peak_memory",
        ),
        (OP_FILE | {"rows": [OP_ROW, {"times_ms": [1]}]}, "missing required field `arguments` - at `$.rows[1]`"),
        (OP_FILE | {"rows": [OP_ROW | {"arguments": []}]}, "Expected `object`, got `array` - at `$.rows[0].arguments`"),
        ({"rows": [MATMUL]}, "expected time_ms, tflops_per_device with m, k and n, or a bandwidth"),
        ({"rows": [MATMUL | {"time_ms": INF}]}, "Expected `float` <= 1000000000000.0 - at `$.rows[0].time_ms`"),
        (
            {"rows": [MATMUL | {"tflops_per_device": INF}]},
            "Expected `float` <= 1000000000000.0 - at `$.rows[0].tflops_per_device`",
        ),
        ({"rows": [MATMUL | {"tflops_per_device": NAN}]}, "Expected `float` > 0.0 - at `$.rows[0].tflops_per_device`"),
        (OP_FILE | {"rows": [OP_ROW | {"confg": {}}]}, "a row has `confg`: expected `config`"),
        ({"rows": [MATMUL | {"time_ms": 1, "dtyp": "float32"}]}, "a row has `dtyp`: expected `dtype`"),
        ({"rows": [MATMUL | {"time_ms": 1, "libtpu_args": "--a 1"}]}, "libtpu_args='--a 1': expected --NAME=VALUE"),
        ({"rows": [MATMUL | {"time_ms": "1"}]}, "Expected `float | null`, got `str` - at `$.rows[0].time_ms`"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(_file(tmp_path / "mine.json", content))
    assert message in str(error.value)
    assert "mine.json" in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_and_what_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"expected files of rows, \*.json, in the folder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="more than one row has the id 'same'"):
        read(_file(tmp_path / "x.json", OP_FILE | {"rows": [OP_ROW | {"id": "same"}] * 2}))


def test_a_field_that_is_not_known_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(_file(tmp_path / "mine.json", OP_FILE | {"rows": [OP_ROW | {"weather": "fine"}]}))
    read(_file(tmp_path / "chip.json", {"rows": [MATMUL | {"time_ms": 1, "bandwidth_gb_s_per_chip": 2}]}))
    assert "`weather` of rows is not used" in caplog.text
    assert "`bandwidth_gb_s_per_chip` of rows is not used" in caplog.text
    caplog.clear()
    read_shipped()
    assert not caplog.text
