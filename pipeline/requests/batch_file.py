"""The JSON-lines file of a batch: one request a line, all checked before any work."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.requests.config import AttentionConfig, GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.request import GenerateRequest, to_request
from pipeline.requests.run_names import run_name

LINE_KEYS = ("name", *(field.name for field in dataclasses.fields(GenerateRequest)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a batch's file: its number from 1, and the folder's name."""

    line: int
    request: GenerateRequest
    name: str


def read_entries(path: Path, config: GenerateConfig) -> list[Entry]:
    """Read a file's lines; `config` has the keys they leave out. Raises RequestError, a message for each wrong line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at other breaks, which a string may hold
    except OSError as error:
        raise RequestError(f"prompts={str(path)!r}: {error.strerror}; expected a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"prompts={str(path)!r}: not UTF-8 text ({error})") from error
    entries: list[Entry] = []
    errors: list[str] = []
    taken: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            entry = _parse_line(text, number, config)
            if entry.name in taken:
                raise RequestError(
                    f"would go to {entry.name!r} as line {taken[entry.name]} does; give it another seed or name, "
                    "e.g. name={line}-{slug}"
                )
        except RequestError as error:
            errors.append(f"{path}:{number}: {error}")
            continue
        taken[entry.name] = number
        entries.append(entry)
    if not entries and not errors:
        errors.append(f'{path}: holds no prompts; expected lines like {{"prompt": "a cat", "seed": 1}}')
    if errors:
        raise RequestError(*errors)
    return entries


def _parse_line(text: str, number: int, config: GenerateConfig) -> Entry:
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also of a number with thousands of digits
        raise RequestError(f'not JSON ({error}); expected an object a line, e.g. {{"prompt": "a cat"}}') from error
    if not isinstance(fields, dict):
        raise RequestError(f'{text.strip()[:80]}: expected an object, e.g. {{"prompt": "a cat"}}')
    if unknown := [key for key in fields if key not in LINE_KEYS]:
        raise RequestError(f"{unknown[0]!r}: no such key; expected some of {', '.join(LINE_KEYS)}")
    if "prompt" not in fields:
        raise RequestError('no "prompt" in it; expected e.g. {"prompt": "a cat"}')
    name = fields.pop("name", config.name)
    if "attention" in fields:
        fields["attention"] = _attention(fields["attention"], config.attention)
    request = to_request(dataclasses.replace(config, **fields))
    return Entry(number, request, run_name(request, name, number))


def _attention(fields: Any, defaults: AttentionConfig) -> AttentionConfig:
    names = [field.name for field in dataclasses.fields(AttentionConfig)]
    if not isinstance(fields, dict) or set(fields) - set(names):
        raise RequestError(f"attention={fields!r}: expected an object of some of {', '.join(names)}")
    return dataclasses.replace(defaults, **fields)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise RequestError(f"{name!r}: twice in one line; expected each key once")
    return dict(pairs)
