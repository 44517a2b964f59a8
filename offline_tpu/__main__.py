"""Print what a JAX function costs on a TPU that is not here.

python -m offline_tpu jax.numpy:matmul bfloat16[4096,4096] bfloat16[4096,4096] --device v6e
python -m offline_tpu my_ops.py:attention bf16[1,16,4096,128] bf16[1,16,4096,128] bf16[1,16,4096,128]
"""

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from offline_tpu import libtpu
from offline_tpu.compile import predict, trace
from offline_tpu.machine.devices import DEVICES, by_name
from offline_tpu.options import parse_options
from splash_workbench import cli
from splash_workbench.errors import OF_USERS_CODE, UserError, innermost_line
from splash_workbench.files import run_file, user_path

_ARRAY = re.compile(r"(\w+)\[((?:\d+(?:,\d+)*)?)\]")
#: HLO's names of dtypes, as its dumps have them.
_HLO_DTYPES = {
    **{"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32"},
    **{f"{short}{bits}": f"{long}{bits}" for short, long in (("s", "int"), ("u", "uint")) for bits in (4, 8, 16, 32)},
    **{"f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"},
}


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m offline_tpu", description=__doc__.partition("\n")[0])
    parser.add_argument("function", help="MODULE:FUNCTION or FILE.py:FUNCTION, of arrays, jitted or not")
    parser.add_argument(
        "arrays", nargs="*", help="the dtypes and shapes of its arguments, e.g. bfloat16[4096,4096], or bf16[4096,4096]"
    )
    parser.add_argument("--device", default="v6e", help=f"one of {', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument(
        "--compiler-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="flags of libtpu for this program",
    )
    parser.add_argument("--ops", type=_count, default=20, help="ops to show, longest first (default: %(default)s)")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of ops, 0 or more")
    return int(text)


@cli.flags_command(_parser)
def main(chosen: argparse.Namespace) -> int:
    """Print the prediction; return the exit code."""
    try:
        device = by_name(chosen.device)
        arrays = [_parse_array(text) for text in chosen.arrays]
        options = parse_options(chosen.compiler_options)
        function = _find_function(chosen.function)
        libtpu.find_dump_dir()  # loads it with the flags that dump, before anything else does
        _call_users_code(chosen.function, lambda: trace(function, *arrays, device=device))
        print(predict(function, *arrays, device=device, compiler_options=options).table(chosen.ops))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)[:1000]) from error
    return 0


def _call_users_code(given: str, call: Callable[[], Any]) -> Any:
    """Return what `call` returns. Raises UserError in one line for whatever the user's code raises."""
    try:
        return call()
    except OF_USERS_CODE as error:
        ours = (*(str(Path(str(module.__file__)).parents[1]) for module in (cli, jax, importlib)), "<")
        line = innermost_line(error, lambda path: not path.startswith(ours))
        said = " ".join(str(error).split())[:1000]
        raise UserError(f"{given}: {type(error).__name__}: {said}{f' ({line})' if line else ''}") from error


def _find_function(given: str) -> Callable[..., Any]:
    source, _, name = given.rpartition(":")
    expected = "expected MODULE:FUNCTION or FILE.py:FUNCTION, e.g. jax.numpy:matmul"
    if not source or not name:
        raise ValueError(f"{given!r}: {expected}.")
    if source.endswith(".py") and not user_path(source).is_file():
        raise ValueError(f"{given!r}: there is no file {source}; {expected}.")
    found: Any = _call_users_code(given, lambda: _import(source))
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{given!r}: {source} has no function {name!r}; {expected}.")
    return found


def _import(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = user_path(source).absolute()
    sys.path.insert(0, str(path.parent))  # as Python does for a script, which may import what lies beside it
    return run_file(path, f"_file_{path.stem}")


def _parse_array(text: str) -> jax.ShapeDtypeStruct:
    match = _ARRAY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected an array as DTYPE[SIZE,SIZE], e.g. bfloat16[4096,4096].")
    try:
        dtype = jnp.dtype(_HLO_DTYPES.get(match[1], match[1]))
    except TypeError as error:
        raise ValueError(f"{text!r}: {match[1]!r} is no dtype; expected e.g. bfloat16, float32 or int8.") from error
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, match[2].split(",")))), dtype)


if __name__ == "__main__":
    sys.exit(main())
