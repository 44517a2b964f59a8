from typing import Any

import jax
import numpy as np
import pytest

from offline_tpu import options
from offline_tpu.machine.devices import DEVICES
from offline_tpu.options import CompilerOptionError, checked_options, option_error, options_text, parse_options


def test_values_are_as_libtpu_reads_them() -> None:
    given = {"xla_tpu_b": True, "xla_a": 65536, "xla_c": 0.5, "xla_d": "text", "xla_e": np.int64(3)}
    assert checked_options(given) == {
        "xla_a": "65536",
        "xla_c": "0.5",
        "xla_d": "text",
        "xla_e": "3",
        "xla_tpu_b": "true",
    }
    assert checked_options(None) == {}


def test_options_of_a_command_line() -> None:
    options = parse_options(["xla_b=2", "--xla_a=x=y"])
    assert options == {"xla_a": "x=y", "xla_b": "2"}
    assert options_text(options) == "xla_a=x=y xla_b=2"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_options(["xla_a"]), "compiler_options=xla_a: expected name=value"),
        (lambda: parse_options(["=1"]), "compiler_options==1: expected name=value"),
        (lambda: checked_options({"--xla_a": 1}), "got '--xla_a'; expected a flag's name"),
        (lambda: checked_options({"xla_a": [1]}), r"compiler_options.xla_a=\[1\]: expected a number, a string"),
    ],
)
def test_what_cannot_be_an_option_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(CompilerOptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("INVALID_ARGUMENT: No such compile option: 'xla_x'", "compiler_options.xla_x: libtpu takes no such option"),
        (
            "Failed to parse '1' into flag xla_x: Valid options are: a, b",
            "compiler_options.xla_x=1: libtpu cannot",
        ),
        (
            "While setting option xla_x, '?' is not a valid bool value.",
            "compiler_options.xla_x: '?' is not a valid",
        ),
    ],
)
def test_what_libtpu_has_against_options(text: str, expected: str) -> None:
    found = option_error(jax.errors.JaxRuntimeError(text))
    assert found is not None and str(found).startswith(expected)
    assert "\n" not in str(found)


def test_other_errors_are_not_about_options() -> None:
    assert option_error(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no VMEM")) is None


@pytest.mark.compile
def test_the_compiler_is_asked_before_any_work() -> None:
    known = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    with pytest.raises(CompilerOptionError, match=r"^compiler_options.xla_tpu_foo: libtpu takes no such option"):
        options.check_with_compiler(DEVICES["v6e"], [known, {"xla_tpu_foo": "1"}])


@pytest.mark.compile
def test_a_value_with_which_nothing_compiles_is_named() -> None:
    tried = [{"xla_tpu_scoped_vmem_limit_kib": "65536"}, {"xla_tpu_scoped_vmem_limit_kib": "-5"}]
    expected = r"^compiler_options: xla_tpu_scoped_vmem_limit_kib=-5: the smallest program does not compile: .*VmemOom"
    with pytest.raises(CompilerOptionError, match=expected):
        options.check_with_compiler(DEVICES["v6e"], tried)


def test_without_options_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "Runner", lambda *_: pytest.fail("a worker was started"))
    options.check_with_compiler(DEVICES["v6e"], [{}])
