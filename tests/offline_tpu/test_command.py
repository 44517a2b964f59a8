"""`python -m offline_tpu`: what it takes, and the one line for what it cannot."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from offline_tpu import __main__ as command

_FILE = """
import beside

def double(x): return x + x
def lost(x): return {}["scale"]
def ends(x): raise SystemExit(3)
class Ops:
    @staticmethod
    def twice(x): return beside.FACTOR * x
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ops.py").write_text(_FILE)
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("\nimport not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["offline_tpu", *arguments])
    return command.main()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jax.numpy"], "'jax.numpy': expected MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["no_such_module:f"], "no_such_module:f: ModuleNotFoundError: No module named 'no_such_module'\n"),
        (["jax.numpy:sine", "float32[8]"], "'jax.numpy:sine': jax.numpy has no function 'sine'"),
        (["jax.numpy:sin", "bfloat16"], "'bfloat16': expected an array as DTYPE[SIZE,SIZE]"),
        (["jax.numpy:sin", "f32[8,,8]"], "'f32[8,,8]': expected an array as DTYPE[SIZE,SIZE]"),
        (["jax.numpy:sin", "bfloat[8]"], "'bfloat[8]': 'bfloat' is no dtype; expected e.g. bfloat16"),
        (["jax.numpy:sin", "float32[8]", "--device", "v4"], "device='v4': not supported"),
        (["no.py:f", "f32[8]"], "'no.py:f': there is no file no.py"),
        (["torn.py:f", "f32[8]"], "torn.py:f: SyntaxError: invalid syntax (torn.py, line 1)"),
        (["needs.py:f", "f32[8]"], "needs.py:f: ModuleNotFoundError: No module named 'not_installed' (needs.py:2)"),
        (["ops.py:Ops.thrice", "f32[8]"], "'ops.py:Ops.thrice': ops.py has no function 'Ops.thrice'"),
        (["jax.numpy:sin", "f32[8]", "--ops", "-3"], "--ops: '-3': expected a number of ops, 0 or more"),
        (["jax.numpy:sin", "f32[8]", "--compiler-options", "xla_a"], "compiler_options=xla_a: expected name=value"),
    ],
)
def test_bad_arguments_are_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("folder")
@pytest.mark.compile
@pytest.mark.parametrize(
    ("function", "message"), [("lost", "KeyError: 'scale' (ops.py:5)"), ("ends", "SystemExit: 3 (ops.py:6)")]
)
def test_what_the_function_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, function: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, f"ops.py:{function}", "f32[8]") == 2
    error = capsys.readouterr().err
    assert error == f"error: ops.py:{function}: {message}\n"


@pytest.mark.usefixtures("folder")
@pytest.mark.compile
@pytest.mark.parametrize("function", ["double", "Ops.twice"])
def test_a_file_beside_others(
    monkeypatch: pytest.MonkeyPatch, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, f"ops.py:{function}", "bf16[256,256]", "--ops", "1") == 0
    printed = capsys.readouterr().out
    assert "on one v6e (predicted" in printed


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("bf16", "bfloat16"), ("s8", "int8"), ("u32", "uint32"), ("pred", "bool"), ("float16", "float16")],
)
def test_dtypes_have_the_names_of_jax_or_of_hlo(text: str, dtype: str) -> None:
    array = command._parse_array(f"{text}[4,128]")
    assert (array.shape, array.dtype) == ((4, 128), jnp.dtype(dtype))
