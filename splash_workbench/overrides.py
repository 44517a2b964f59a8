"""Checks the overrides of a command line against the command's schema, before Hydra composes them."""

import dataclasses
import difflib
import fnmatch
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException

from splash_workbench.errors import UserError

_MAX_SUGGESTIONS = 3
#: Before a text that OmegaConf would take for a value to come; `as_given` drops it. No argument of a process holds it.
_MARK = "\0"
#: Hydra's functions that name the values of several runs.
_SWEEP = re.compile(r"(choice|glob|shuffle|sort)\(.*\)", re.DOTALL)


def key_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every key of a schema, e.g. {"search": SearchSettings, "search.seed": int}.

    Of `T | None` the type is T, except of text: there null is no text.
    """
    found = {}
    for name, kind in typing.get_type_hints(schema).items():
        if NoneType in typing.get_args(kind) and str not in typing.get_args(kind):
            kind = next(part for part in typing.get_args(kind) if part is not NoneType)
        found[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            found |= key_types(typing.cast(type, kind), f"{prefix}{name}.")
    return found


def used_keys(schema: type, unused: Collection[str]) -> dict[str, Any]:
    """Return the `key_types` of a schema without those that match a pattern in `unused`, as "workload.*"."""
    found = key_types(schema)
    return {key: found[key] for key in found if not any(fnmatch.fnmatchcase(key, pattern) for pattern in unused)}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys that a command takes.

    Attributes:
      types: see `key_types`. The values of text keys are taken literally, whatever characters they hold, except that
        with --multirun a comma without a space behind it stands between the values of two runs. A group's type may have
        an attribute `unsupported`: option that is left out on purpose -> why.
      groups: the configuration groups; unset_groups: those of which none is chosen unless the command line does.
      free: keys of mappings that take any name below them, as compiler_options.NAME=value.
      text_or_list: keys whose value is text, too, unless it begins with a bracket.
    """

    types: Mapping[str, Any]
    groups: Collection[str]
    text_or_list: Collection[str] = ()
    unset_groups: Collection[str] = ()
    free: Collection[str] = ()

    def checked(self, arguments: Sequence[str], settings: Sequence[str] = ()) -> list[str]:
        """Return arguments for Hydra: its flags, then `settings`, then the overrides with their text quoted.

        Raises UserError for an argument that is neither a flag of Hydra nor the key=value of a key that there is.
        """
        parser = get_args_parser()
        parser.error, parser.allow_abbrev = _refuse, False  # type: ignore[method-assign]
        options, unknown = parser.parse_known_intermixed_args(list(arguments))
        for flag in unknown:
            name = flag.lstrip("-").partition("=")[0].replace("-", "_")
            raise UserError(f"{flag}: no such option; expected key=value{self._nearest(name)}")
        flags = [argument for argument in arguments if argument not in options.overrides]
        if options.help:  # which is a string.Template
            options.overrides = [override.replace("$", "$$") for override in options.overrides]
        overrides = [self._quoted(override, options.multirun) for override in options.overrides]
        # As it is by default; Hydra itself takes no null for a group.
        overrides = [each for each in overrides if each not in {f"{group}=null" for group in self.unset_groups}]
        for override in overrides:
            self._check(override)
            group, dot, _ = override.partition("=")[0].partition(".")
            if dot and group in self.unset_groups and not any(other.startswith(f"{group}=") for other in overrides):
                raise UserError(f"{override}: expected {group}=name beside it")
        return [*flags, *settings, *overrides]

    def explain(self, error: HydraException | OmegaConfBaseException) -> str:
        """Return as one line what Hydra or OmegaConf has against the values."""
        if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
            group, _, option = error.missing_cfg_file.rpartition("/")
            reason = getattr(self.types.get(group), "unsupported", {}).get(option, "no such option")
            return f"{group}={option}: {reason}; expected one of {', '.join(error.options)}"
        return _reason(error)

    def _quoted(self, override: str, multirun: bool) -> str:
        name, _, value = override.partition("=")
        key = name.lstrip("+")
        if name == key and (key.rpartition(".")[0] in self.free or (key in self.free and value.startswith("{"))):
            return f"++{override}"
        kind = self.types.get(key)
        if key in self.groups or not value:
            return override
        if key in self.text_or_list:
            return override if value.startswith("[") else f"{name}={_literal(value)}"
        if value == "null" and kind is str and key.endswith(("dir", "path")):
            raise UserError(f"{override}: expected a path; ./null is one of that name")
        if kind not in (str, str | None) or (value == "null" and kind is not str):
            return override
        if multirun and _SWEEP.fullmatch(value):
            return override
        texts = re.split(r",(?=\S)", value) if multirun else [value]
        return f"{name}={','.join(map(_literal, texts))}"

    def _check(self, override: str) -> None:
        try:
            (parsed,) = OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            expected = 'expected key=value; quote text with spaces: prompt="a cat"'
            raise UserError(f"{override}: {_reason(error) if '=' in override else expected}") from error
        key = parsed.key_or_group
        if re.match(r"hydra[./]", key):
            return
        if key not in self.groups and not self._is_known(key):
            raise UserError(f"{key}: no such key{self._nearest(key)}")
        if parsed.type not in (OverrideType.CHANGE, OverrideType.FORCE_ADD) or parsed.package is not None:
            raise UserError(f"{override}: expected {key}=value; +, ~ and @ have no use here")
        if key in self.groups and not parsed.is_sweep_override() and not isinstance(parsed.value(), str):
            raise UserError(f"{override}: expected {key}=name, with a name of configs/{key}/")

    def _is_known(self, key: str) -> bool:
        """Return whether the schema has the key, or one above it that is free in what it holds."""
        above = key
        while above and above not in self.types:
            above = above.rpartition(".")[0]
        return bool(above) and (above == key or not dataclasses.is_dataclass(self.types[above]))

    def _nearest(self, key: str) -> str:
        by_last: dict[str, list[str]] = {}
        for name in dict.fromkeys([*self.types, *self.groups]):
            by_last.setdefault(name.rpartition(".")[2], []).append(name)
        last_parts = difflib.get_close_matches(key.rpartition(".")[2], by_last, _MAX_SUGGESTIONS, cutoff=0.7)
        found = [name for last in last_parts for name in by_last[last]]
        return f"; did you mean {' or '.join(found[:_MAX_SUGGESTIONS])}? See --help" if found else "; see --help"


def one_line(error: BaseException | str) -> str:
    """Return a message of several lines as one."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _reason(error: HydraException | OmegaConfBaseException) -> str:
    """Return the text of an error and its cause, without what only developers of Hydra need."""
    text = str(error).split("Config search path:")[0]
    text = re.sub(r"^Error (merging|parsing) override '?", "", text)
    if error.__cause__ is not None:
        text = f"{text.splitlines()[0]}: {error.__cause__}"
    return one_line(re.sub(r"(?m)^\s*(full_key:|object_type=|reference_type=|See https|To append).*$", "", text))


def as_given(value: Any) -> Any:
    """Return the text of a value as the user gave it, after OmegaConf; other values as they are."""
    return value.replace(_MARK, "") if isinstance(value, str) else value


def _literal(text: str) -> str:
    text = f"{_MARK}{text}" if text == MISSING else text
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # for OmegaConf, which would look for a key of that name
    return QuotedString(text, Quote.single).with_quotes()


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see --hydra-help")
