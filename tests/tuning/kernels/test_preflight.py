"""What a look at a user's kernel finds before its sweep."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status, TrialError
from tuning.backends.jobs import Request
from tuning.backends.preflight import look
from tuning.kernels import loading
from tuning.kernels.protocol import tunables

SCALED = Path(__file__).with_name("scaled.py")
SPACE = {"block": [8, 16, 64], "add_first": [False, True]}


@pytest.fixture
def look_at(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Look at a kernel of scaled.py, as a sweep that predicts nothing does."""

    def look_at(name: str, rows: int = 64) -> dict[str, Any]:
        return look(
            {
                "kernel": f"{SCALED}:{name}",
                "kernel_hash": "h",
                "shape": None,
                "dtype": "",
                "block_sizes": None,
                "options": {"block": 8, "add_first": False},
                "device": "local",
                "cache_dir": str(tmp_path),
                "measure": {},
                "sizes": {"rows": rows},
                "space": SPACE if name != "NanWhereUnwritten" else {"block": SPACE["block"]},
                "traces": True,
                "device_checks": False,
            }
        )

    return look_at


def test_nothing_is_said_of_a_good_kernel(look_at: Callable[[str], dict[str, Any]]) -> None:
    assert look_at("Scaled") == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Idle", r"Idle\.Config\.add_first changes nothing: JAX traces the same program for False, True"),
        ("Flat", r"Flat: what build makes returns \[8192\], and the reference \[64, 128\]\."),
        ("BuildsNothing", r"BuildsNothing\.build\(Config\(.*\)\) returns 3: expected a function of the arguments"),
        ("TakesAnother", r"TakesAnother\.baselines: XLA: TypeError: .* missing 1 required positional argument"),
        ("Plain", r"Plain\.arguments: KernelError: arguments: the one at 0 is 1\.0, expected a jax\.Shape"),
        ("Exits", r"^scaled\.py:\d+: Exits\.build: SystemExit: 3$"),
        ("Divides", r"^scaled\.py:\d+: Divides\.build: ZeroDivisionError: integer division or modulo by zero$"),
        ("UnrollsFive", r"UnrollsFive\.unrolled\(.*\) returns 5: expected an Unrolled, or None"),
        (
            "UnrollsTheSame",
            r"UnrollsTheSame\.unrolled\(.*\) returns Unrolled\(length=8, .*: expected a length below 8\.",
        ),
        ("AssumesNothing", r"AssumesNothing\.assume\(.*\) returns None: expected grid sizes, notes"),
        ("ListsBaselines", r"ListsBaselines\.baselines\(\) returns \[\]: expected functions by name"),
        ("ReturnsNothing", r"ReturnsNothing\.reference returns no array: expected what build makes returns"),
        ("NanWhereUnwritten", r"Config\(block=8, add_first=False\) disagrees with the reference: rms_error=nan"),
    ],
)
def test_what_is_wrong_is_one_line(look_at: Callable[[str], dict[str, Any]], name: str, message: str) -> None:
    with pytest.raises(TrialError, match=message) as caught:
        look_at(name)
    assert "\n" not in str(caught.value)


def test_a_result_that_is_not_written_whole_at_the_real_sizes(look_at: Callable[..., dict[str, Any]]) -> None:
    assert look_at("Partly", rows=24) == {}
    message = r"Partly: the default configuration .* writes only 2 of the 3 blocks of float32\[20,128\] \(rows=20\)\."
    with pytest.raises(TrialError, match=message):
        look_at("Partly", rows=20)


def test_a_value_that_build_refuses_is_not_called_idle(look_at: Callable[..., dict[str, Any]]) -> None:
    assert look_at("Refuses") == {}


def test_a_mistake_in_one_configuration_is_that_candidates(look_at: Callable[..., dict[str, Any]]) -> None:
    """It is no fault of the machine, after which a candidate would be tried again."""
    assert look_at("Trips") == {}
    fields = {"kernel": f"{SCALED}:Trips", "options": {"block": 8, "add_first": True}, "sizes": {"rows": 64}}
    unused = {"kernel_hash": "h", "shape": None, "dtype": "", "block_sizes": None, "cache_dir": "", "measure": {}}
    request = decode(fields | unused | {"device": "local"}, Request)
    for implementation in ("pallas_tpu", "pallas_interpret"):
        with pytest.raises(TrialError, match=r"^scaled\.py:\d+: KeyError: 'block'$") as caught:
            request.function(implementation)(*request.arguments())
        assert caught.value.status is Status.COMPILE_ERROR


def test_sizes_that_make_an_argument_empty(look_at: Callable[..., dict[str, Any]]) -> None:
    message = r"Scaled\.arguments\(Sizes\(rows=0\)\): the one at 0 is float32\[0, 128\], expected sizes of 1 or more"
    with pytest.raises(TrialError, match=message):
        look_at("Scaled", rows=0)


def test_a_reference_that_disagrees(look_at: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALED_IS_WRONG", "1")
    with pytest.raises(TrialError, match=r"Scaled: the default configuration .* disagrees with the reference"):
        look_at("Scaled")


def test_nothing_is_said_of_the_tutorials_kernel(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text()
    path = tmp_path / "scale_rows.py"
    path.write_text(page.split("```python\n")[1].split("```")[0])
    kernel = loading.find(f"{path}:ScaleRows")
    request = {
        "kernel": f"{path}:ScaleRows",
        "kernel_hash": "h",
        "shape": None,
        "dtype": "",
        "block_sizes": None,
        "options": dataclasses.asdict(kernel.Config()),
        "device": "local",
        "cache_dir": str(tmp_path),
        "measure": {},
        "sizes": dataclasses.asdict(kernel.Workload()),
    }
    assert look(request | {"space": tunables(kernel), "traces": True, "device_checks": False}) == {}
