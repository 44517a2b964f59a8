"""What every command of tuning shares: Hydra configuration in, one line for a user's error, JSON on request."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from splash_workbench.files import atomic_path
from splash_workbench.provenance import REPO_ROOT

CONFIG_DIR = REPO_ROOT / "configs"
T = TypeVar("T")
_FULL_ERROR = "HYDRA_FULL_ERROR"
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


# Text that is meant literally: Hydra's grammar gives commas, quotes and brackets a meaning of their own.
_LITERAL_KEYS = (
    "prompt",
    "prompts",
    "name",
    "negative_prompt",
    "checkpoint",
    "stages",
    "run_dir",
    "output_dir",
    "results_path",
    "cache_dir",
    "logdir",
    "profile_run",
)


class UserError(ValueError):
    """Something that the user can put right: shown as one line, without a traceback."""


@dataclasses.dataclass
class WorkloadSchema:
    """Fields of configs/workload/*.yaml; becomes a tuning.trials.workloads.Workload."""

    name: str = MISSING
    batch_size: int = MISSING
    num_heads: int = MISSING
    q_seq_len: int = MISSING
    kv_seq_len: int = MISSING
    head_dim: int = MISSING
    dtype: str = MISSING


@dataclasses.dataclass
class DeviceSchema:
    """Fields of configs/device/*.yaml; the figures are in offline_tpu.machine.devices."""

    name: str = MISSING


@dataclasses.dataclass
class BackendSchema:
    """Fields of configs/backend/*.yaml; `measure` becomes a tuning.backends.timing.MeasureSettings."""

    name: str = MISSING
    measure: dict[str, Any] = dataclasses.field(default_factory=dict)


def store_schema(name: str, schema: type) -> None:
    """Lets configs/<command>.yaml be checked against a dataclass: its defaults list starts with `name`."""
    ConfigStore.instance().store(name=name, node=schema)


def run(config_name: str, command: Callable[[DictConfig], int]) -> int:
    """Composes configs/<config_name>.yaml with the overrides in sys.argv and runs the command.

    Returns:
      The exit code: the command's, 2 for an error of the user, 130 after Ctrl-C.
    """
    outcome: int | BaseException = 0

    def task(config: DictConfig) -> None:
        # Errors of the command are kept from Hydra, which would add lines of its own.
        nonlocal outcome
        try:
            if missing := sorted(OmegaConf.missing_keys(config)):
                raise UserError(f"{', '.join(missing)}: expected a value.")
            outcome = command(config)
        except (UserError, KeyboardInterrupt) as error:
            outcome = error

    asked_for_traceback = bool(os.environ.get(_FULL_ERROR))
    os.environ[_FULL_ERROR] = "1"  # Hydra then lets its own errors through, instead of printing a wall of text
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        outcome = error
    finally:
        if not asked_for_traceback:
            del os.environ[_FULL_ERROR]
    if isinstance(outcome, int):
        return outcome
    if isinstance(outcome, KeyboardInterrupt):
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    if asked_for_traceback:
        raise outcome
    print(f"error: {_one_line(outcome)}", file=sys.stderr)
    return EXIT_USER_ERROR


def from_config(make: Callable[[], T]) -> T:
    """Builds a frozen type from configuration: what it refuses is the user's error."""
    try:
        return make()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(str(error)) from error


def plain(config: Any) -> Any:
    """A node of the configuration as plain dicts and lists."""
    return OmegaConf.to_container(config, resolve=True)


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """What a command printed, as JSON; does nothing without a path."""
    if path is None:
        return
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages without the lines that only their developers need."""
    texts = [str(error)]
    if error.__cause__ is not None and not isinstance(error, UserError) and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    lines = [line.strip() for text in texts for line in text.split("Config search path:")[0].splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=")
    return " ".join(line for line in lines if line and not line.startswith(noise))


def protect_literals(arguments: list[str]) -> list[str]:
    """Make Hydra take the values of `_LITERAL_KEYS` as they are, whatever characters they hold.

    They are handed over encoded, as `prompt='${literal:x...}'`, for `decode_literal` to restore. Empty values, null,
    lists of stages, and what the user has quoted for Hydra already stay as they are.
    """
    if {"-m", "--multirun"} & set(arguments):
        return arguments  # commas then separate runs
    return [_protect(argument) for argument in arguments]


def _protect(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if key not in _LITERAL_KEYS or not equals or value in ("", "null") or (key == "stages" and value.startswith("[")):
        return argument
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in value[1:-1]:
        return argument
    return f"{key}='${{literal:x{value.encode().hex()}}}'"


def decode_literal(encoded: str) -> str:
    """The text that `protect_literals` encoded."""
    return bytes.fromhex(encoded.removeprefix("x")).decode()
