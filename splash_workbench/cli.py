"""Turns functions into commands: configuration or flags in, an exit code out, one line for a user's error."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import select
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from splash_workbench.accelerator import quiet_jax_without_accelerator
from splash_workbench.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_SIGNAL,
    EXIT_USER_ERROR,
    TornLineWarning,
    UserError,
    from_config,
)
from splash_workbench.files import atomic_path, require_writable, require_writable_file, user_path
from splash_workbench.overrides import Keys, as_given, one_line, used_keys
from splash_workbench.provenance import CACHE_VARIABLE, CONFIG_DIR, user_cache_dir
from splash_workbench.startup import interrupts_raise, sigterm_raises

S = TypeVar("S")
_stock_warning_line = warnings.formatwarning
_FULL_ERROR = "HYDRA_FULL_ERROR"
#: Keys of schemas that hold paths.
_PATHS = {
    *("cache_dir", "dumps", "folder", "json", "logdir", "measured", "output", "output_dir", "page_dir", "predictions"),
    *("prompts", "results_dir", "storage"),
    *("results_path", "run_dir", "start_from", "tuned", "tuned_dir", "validation", "videos_dir", "work_dir"),
}
#: Those of files; of the others the last part of the name says whether a folder is meant.
_FILES = {"json", "measured", "predictions", "prompts", "results_path", "start_from", "tuned"}
#: Keys that say that what is done is kept, or where: the same command takes it.
_KEEPS = frozenset({"page_dir", "resume", "reuse", "work_dir"})
_GOES_ON, _ANEW = "the same command goes on from what is finished", "the same command begins anew"
#: Groups whose options differ in what they are -> the key below the group that says which one it is.
_SAYS_WHICH = {"backend": "name", "cache": "method", "engine": "name", "parallel": "plan", "search": "sampler"}
#: A command stays in the user's folder, and Hydra writes nothing there.
_HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def command(
    name: str,
    schema: type[S],
    *,
    text_or_list: Collection[str] = (),
    unused: Collection[str] = (),
    free: Collection[str] = (),
    resolvers: Mapping[str, Callable[..., Any]] | None = None,
    goes_on: Callable[[S], bool] | None = None,
    interrupted: str = _ANEW,
) -> Callable[[Callable[[S], int]], Callable[[], int]]:
    """Make a function of settings the entry point of a command that Hydra configures from sys.argv.

    Args:
      name: of configs/<name>.yaml, whose defaults list begins with <name>_schema.
      schema: a mutable dataclass; the function gets an instance, checked for types.
      text_or_list: see `splash_workbench.overrides.Keys`.
      free: see `splash_workbench.overrides.Keys`.
      unused: keys of the schema, or patterns of them, that the command has no use for, and refuses.
      resolvers: name -> function that the configuration uses as ${name:}.
      goes_on: whether the same command, where it is interrupted, goes on from what is finished; None: where one of the
        keys _KEEPS, of those that it uses, is set.
      interrupted: what is said where it does not.

    The entry point returns the function's exit code, or one of those above for an error of the user (UserError,
    OSError, or a value that does not fit the schema), after Ctrl-C, and where nobody reads on.
    """

    def decorate(function: Callable[[S], int]) -> Callable[[], int]:
        @functools.wraps(function)
        def main() -> int:
            running: list[S] = []
            return _exit_code(
                lambda: _compose_and_run(function, running), lambda: _GOES_ON if keeps(running) else interrupted
            )

        main.keys = keys_used  # type: ignore[attr-defined] # for what describes the command
        return main

    keys_used = used_keys(schema, unused)

    def keeps(running: list[S]) -> bool:
        if not running:
            return False
        if goes_on is not None:
            return goes_on(running[-1])
        values = [getattr(running[-1], key) for key in _KEEPS & keys_used.keys()]
        return any(value is True or isinstance(value, str) for value in values)  # others have such names, too

    def _compose_and_run(function: Callable[[S], int], running: list[S]) -> int:
        config_file: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{name}.yaml"))
        groups = {
            group: entry[group] for entry in config_file["defaults"] if isinstance(entry, dict) for group in entry
        }
        unset = [group for group, option in groups.items() if option is None]
        keys = Keys(keys_used, groups, text_or_list, unset, free)
        store: Any = ConfigStore.instance()
        store.store(name=f"{name}_schema", node=schema)
        # Hydra copies its sources for each reading, and with them every schema there is; it reads from copies anyhow.
        store.__deepcopy__ = lambda memo: store
        for resolver, resolve in (resolvers or {}).items():
            OmegaConf.register_new_resolver(resolver, resolve, replace=True)
        outcomes: list[int | Exception] = []
        written: set[str] = set()

        def task(config: DictConfig) -> None:
            if any(isinstance(outcome, int) and outcome >= EXIT_SIGNAL for outcome in outcomes):
                return  # a signal ends all runs, not only the one it came in
            try:
                if missing := sorted(OmegaConf.missing_keys(config)):
                    raise UserError(f"{', '.join(missing)}: expected a value")
                settings: Any = from_config(lambda: OmegaConf.to_object(config))
                _finish_values(settings)
                _check_groups(config)
                _check_outputs(settings)
                if (path := getattr(settings, "json", None)) in written:
                    raise UserError(f"json={path}: holds the run before; expected one a run, as json=a.json,b.json")
                running.append(settings)
                outcomes.append(function(settings))
                written.update([path] if path is not None else [])
            except Exception as error:  # kept from Hydra, which would add lines of its own
                outcomes.append(error)

        try:
            with _hydra_arguments(keys):
                hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(task)()
        except (HydraException, OmegaConfBaseException) as error:
            outcomes.append(error)
        messages: list[str] = []
        for outcome in outcomes:  # more than one with --multirun
            if isinstance(outcome, HydraException | OmegaConfBaseException):
                messages.append(keys.explain(outcome))
            elif isinstance(outcome, UserError | OSError) and not isinstance(outcome, BrokenPipeError):
                messages.extend(_messages(outcome))
            elif isinstance(outcome, Exception):
                raise outcome
        if messages:
            cause = next(outcome for outcome in outcomes if isinstance(outcome, Exception))
            raise UserError(*dict.fromkeys(messages)) from cause
        return max((outcome for outcome in outcomes if isinstance(outcome, int)), default=0)

    return decorate


def flags_command(make_parser: Callable[[], "Parser"]) -> Callable[[Callable[[Any], int]], Callable[[], int]]:
    """Make a function of parsed flags the entry point of a command; errors and exit codes are those of `command`."""

    def decorate(function: Callable[[Any], int]) -> Callable[[], int]:
        @functools.wraps(function)
        def main() -> int:
            return _exit_code(lambda: function(make_parser().parse_args()))

        return main

    return decorate


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing how to use the command."""
        raise UserError(f"{message}; see --help")


def _finish_values(settings: Any) -> None:
    """Make text what the user gave, and paths begin at the user's home where they begin with ~.

    Raises UserError for an empty path, which would be the folder that the command runs in.
    """
    for name, value in vars(settings).items():
        if dataclasses.is_dataclass(value):
            _finish_values(value)
        elif isinstance(value, str):
            if name in _PATHS and not value.strip():
                optional = NoneType in typing.get_args(typing.get_type_hints(type(settings))[name])
                kind = "file" if name in _FILES else "folder" if name.endswith(("dir", "folder")) else "path"
                raise UserError(f"{name}={value!r}: expected a {kind}{', or null' if optional else ''}.")
            setattr(settings, name, os.path.expanduser(as_given(value)) if name in _PATHS else as_given(value))


def given_keys() -> frozenset[str]:
    """Return the keys that the command line of the command that runs names."""
    return frozenset(override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task)


def _check_groups(config: DictConfig) -> None:
    """Raise UserError where the command line names a group's option and a key that makes it another one."""
    given, choices = given_keys(), HydraConfig.get().runtime.choices
    for group, name in _SAYS_WHICH.items():
        key = f"{group}.{name}"
        if group in given and key in given:
            expected: Any = OmegaConf.select(OmegaConf.load(CONFIG_DIR / group / f"{choices[group]}.yaml"), name)
            value = as_given(OmegaConf.select(config, key))
            if expected not in (None, value):
                raise UserError(f"{group}={choices[group]} and {key}={value!r}: expected one of them")


def _check_outputs(settings: Any) -> None:
    """Raise UserError, before the work, where writing what it leaves behind would fail after it."""
    for key in ("json", "results_path"):
        path = getattr(settings, key, None)
        if path is not None:
            require_writable_file(f"{key}={path}", Path(path))
    if getattr(settings, "profile", False):
        require_writable(f"logdir={settings.logdir}", Path(settings.logdir))
    elif (run := getattr(settings, "profile_run", None)) is not None:
        raise UserError(f"profile_run={run!r}: only with profile=true.")


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """Write to a file what a command printed; do nothing without a path."""
    if path is not None:
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return rows of cells as lines, the columns in `left` flush left and the others, of figures, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def _hydra_arguments(keys: Keys) -> Iterator[None]:
    """Let Hydra read checked arguments, leave nothing behind, and raise its errors instead of printing many lines."""
    argv, full_error = sys.argv, os.environ.get(_FULL_ERROR)
    with contextlib.ExitStack() as stack:
        settings = list(_HYDRA_SETTINGS)
        if {"-m", "--multirun"} & set(argv):  # Hydra insists on a multirun.yaml
            settings.append(f"hydra.sweep.dir='{stack.enter_context(tempfile.TemporaryDirectory())}'")
        sys.argv = [argv[0], *keys.checked(argv[1:], settings)]
        os.environ[_FULL_ERROR] = "1"
        try:
            yield
        finally:
            sys.argv = argv
            if full_error is None:
                del os.environ[_FULL_ERROR]
            else:
                os.environ[_FULL_ERROR] = full_error


def _exit_code(run: Callable[[], int], interrupted: Callable[[], str] = lambda: _ANEW) -> int:
    """Run, and tell the user in one line where that fails for a reason that is the user's."""
    quiet_jax_without_accelerator()
    warnings.formatwarning = _warning_line
    try:
        interrupts_raise()
        with sigterm_raises():
            code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(f"interrupted; {interrupted()}", file=sys.stderr)
        return EXIT_SIGNAL + getattr(error, "signal_number", EXIT_INTERRUPTED - EXIT_SIGNAL)
    except BrokenPipeError:
        if not _drop_broken_streams():
            raise
        return EXIT_BROKEN_PIPE
    except (UserError, OSError) as error:
        if os.environ.get(_FULL_ERROR):
            raise
        for message in _messages(error):
            print(f"error: {one_line(message)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _warning_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """Return a warning as it is printed: ours in one line, of a library where it is from, too."""
    if category is TornLineWarning:
        return f"warning: {message}\n"
    return _stock_warning_line(message, category, *where, **more)


def _messages(error: UserError | OSError) -> tuple[str, ...]:
    if isinstance(error, UserError):
        return error.messages
    if error.errno is None:
        return (str(error) or type(error).__name__,)
    named = user_path(str(error.filename or "")).absolute()
    cache = user_cache_dir().absolute()
    of_cache = error.filename and (named.is_relative_to(cache) or (cache.is_relative_to(named) and not named.is_dir()))
    remedy = f"; ${CACHE_VARIABLE} names another folder for what can be made again" if of_cache else ""
    return (f"{error.filename or 'a file'}: {error.strerror}{remedy}",)


def _drop_broken_streams() -> bool:
    """Return whether stdout or stderr is read no more, as with `| head`, and drop what is written there."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    broken = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(broken)
