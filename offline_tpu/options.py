"""Options of libtpu's compiler that are given for one program, in place of flags for the whole process."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from offline_tpu.libtpu import check_setup, worker_environment
from offline_tpu.machine.devices import DeviceSpec
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Runner

Value = str | int | float | bool

_TRY_TIMEOUT_S = 300.0
_NAME = re.compile(r"[a-z]\w+")


class CompilerOptionError(ValueError):
    """Compiler options that libtpu does not take; the message is one line."""


def checked_options(options: Mapping[str, Value] | None) -> dict[str, str]:
    """Return options by name, sorted, with their values as libtpu reads them: True is "true".

    Whether libtpu has them shows when it compiles; see `option_error`.

    Raises:
      CompilerOptionError: a name or a value cannot be one of a flag.
    """
    found: dict[str, str] = {}
    if not isinstance(options, Mapping | None):
        raise CompilerOptionError(f"compiler_options={options!r}: expected a dict of flags, by name.")
    for name, value in sorted((options or {}).items(), key=str):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CompilerOptionError(
                f"compiler_options: got {name!r}; expected a flag's name, e.g. xla_tpu_scoped_vmem_limit_kib."
            )
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, Value):
            raise CompilerOptionError(f"compiler_options.{name}={value!r}: expected a number, a string, true or false.")
        found[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def check_with_compiler(device: DeviceSpec, options: Sequence[Mapping[str, str]]) -> None:
    """Compile the smallest program with each set of options, in a process of its own.

    Raises:
      CompilerOptionError: libtpu does not take them.
      UnsupportedVersionError: as `check_setup`.
    """
    if not any(options):
        return
    check_setup()
    payload = {"device": device.name, "options": [dict(each) for each in options]}
    with tempfile.TemporaryDirectory() as folder:
        outcome = Runner(Path(folder)).run(
            "offline_tpu.compile:try_options",
            payload,
            timeout_s=_TRY_TIMEOUT_S,
            variables=lambda worker_dir: worker_environment(device, worker_dir / "dump"),
        )
    if outcome.status is not Status.OK:
        said = outcome.error or outcome.status.value
        named = said.startswith("compiler_options")
        given = ", or ".join(options_text(each) for each in options if each)
        raise CompilerOptionError(said if named else f"compiler_options: {given}: {said}")


def options_text(options: Mapping[str, str]) -> str:
    """Return options as on a command line, "" for none."""
    return " ".join(f"{name}={value}" for name, value in options.items())


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """Return the options of "name=value" texts, as they are on command lines.

    Raises:
      CompilerOptionError: one is not of that form.
    """
    pairs = [text.removeprefix("--").partition("=") for text in texts]
    for text, (name, equals, value) in zip(texts, pairs, strict=True):
        if not (name and equals and value):
            raise CompilerOptionError(
                f"compiler_options={text}: expected name=value, e.g. xla_tpu_scoped_vmem_limit_kib=65536."
            )
    return checked_options({name: value for name, _, value in pairs})


def option_error(error: jax.errors.JaxRuntimeError) -> CompilerOptionError | None:
    """Return the one-line error for options that libtpu refuses; None for another error."""
    if unknown := re.search(r"No such compile option: '(\w+)'", str(error)):
        return CompilerOptionError(
            f"compiler_options.{unknown[1]}: libtpu takes no such option for one program; expected one as "
            "xla_tpu_scoped_vmem_limit_kib."
        )
    if refused := re.search(r"Failed to parse '(.*)' into flag (\w+): *([^\n]*)", str(error)):
        value, name, reason = refused.groups()
        return CompilerOptionError(f"compiler_options.{name}={value}: libtpu cannot read the value. {reason}".strip())
    if refused := re.search(r"While setting option (\w+), ([^\n]*)", str(error)):
        return CompilerOptionError(f"compiler_options.{refused[1]}: {refused[2]}")
    return None
