"""Print what a JAX function costs on a TPU that is not here.

python -m offline_tpu jax.numpy:matmul bfloat16[4096,4096] bfloat16[4096,4096] --device v6e
"""

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax

from offline_tpu.compile import predict
from offline_tpu.machine.devices import DEVICES
from offline_tpu.options import parse_options
from splash_workbench import cli
from splash_workbench.errors import UserError

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m offline_tpu", description=__doc__.partition("\n")[0])
    parser.add_argument("function", help="MODULE:FUNCTION, of arrays, jitted or not")
    parser.add_argument("arrays", nargs="*", help="the shapes of its arguments, e.g. bfloat16[4096,4096]")
    parser.add_argument("--device", default="v6e", help=f"one of {', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument(
        "--compiler-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="flags of libtpu for this program",
    )
    parser.add_argument("--ops", type=int, default=20, help="ops to show, longest first (default: %(default)s)")
    return parser


@cli.flags_command(_parser)
def main(chosen: argparse.Namespace) -> int:
    """Print the prediction; return the exit code."""
    try:
        arrays = [_parse_array(text) for text in chosen.arrays]
        options = parse_options(chosen.compiler_options)
        function = _import_function(chosen.function)
        print(predict(function, *arrays, device=chosen.device, compiler_options=options).table(chosen.ops))
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(str(error)[:1000]) from error
    return 0


def _import_function(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    function = getattr(importlib.import_module(module), name, None) if module else None
    if not callable(function):
        raise ValueError(f"{text!r}: expected MODULE:FUNCTION, e.g. jax.numpy:matmul.")
    return function


def _parse_array(text: str) -> jax.ShapeDtypeStruct:
    match = _ARRAY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected an array as DTYPE[SIZE,SIZE], e.g. bfloat16[4096,4096].")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, match[2].split(",")))), match[1])


if __name__ == "__main__":
    sys.exit(main())
