"""A batch: requests from a file, JSON lines or plain text, or of one prompt with several seeds. All checked first."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError, require_number
from pipeline.requests.limits import MAX_VIDEOS
from pipeline.requests.request import GenerateRequest, to_request
from pipeline.requests.run_names import run_name
from pipeline.requests.unused import check_used

T = TypeVar("T")
LINE_KEYS = ("name", *(field.name for field in dataclasses.fields(GenerateRequest)), "num_videos")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A video of a batch: the number of its line, from 1, and the folder's name."""

    line: int
    request: GenerateRequest
    name: str


def read_entries(path: Path, config: GenerateConfig) -> list[Entry]:
    """Read a file's lines; `config` has the keys they leave out. Raises RequestError, a message for each wrong line.

    A file *.txt holds a prompt a line, any other a JSON object a line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at other breaks, which a string may hold
    except OSError as error:
        raise RequestError(
            f"prompts={str(path)!r}: {error.strerror}; expected a file of JSON lines, or *.txt"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"prompts={str(path)!r}: not UTF-8 text ({error})") from error
    entries: list[Entry] = []
    errors: list[str] = []
    taken: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            if path.suffix == ".txt":
                found = entries_of(dataclasses.replace(config, prompt=text.strip()), number)
            else:
                found = _parse_line(text, number, config)
            for entry in found:
                if entry.name in taken:
                    raise RequestError(
                        f"would go to {entry.name!r} as line {taken[entry.name]} does; give it another seed or name, "
                        "e.g. name={line}-{slug}"
                    )
                taken[entry.name] = number
                entries.append(entry)
        except RequestError as error:
            errors.append(f"{path}:{number}: {error}")
    if not entries and not errors:
        form = "a prompt a line" if path.suffix == ".txt" else 'lines like {"prompt": "a cat", "seed": 1}'
        errors.append(f"{path}: holds no prompts; expected {form}")
    if errors:
        raise RequestError(*errors)
    return entries


def entries_of(config: GenerateConfig, number: int = 1) -> list[Entry]:
    """Return the `num_videos` videos of a configuration's prompt, their seeds counted up from `seed`.

    number: of the line. Raises RequestError.
    """
    count, request = config.num_videos, to_request(config)
    require_number("num_videos", count, 1, MAX_VIDEOS)
    requests = [dataclasses.replace(request, seed=request.seed + index) for index in range(count)]
    entries = [Entry(number, request, run_name(request, config.name, number)) for request in requests]
    if len({entry.name for entry in entries}) < count:
        raise RequestError(f"name={config.name!r}: the same for {count} videos; expected one with {{seed}} in it")
    return entries


def _parse_line(text: str, number: int, config: GenerateConfig) -> list[Entry]:
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
    groups = ("attention", "cache")
    given = set(fields) - set(groups)
    for name in groups:
        if name in fields:
            own = fields[name]
            fields[name] = _group(name, own, getattr(config, name))
            given |= {f"{name}.{key}" for key in own}
    config = dataclasses.replace(config, **fields)
    entries = entries_of(config, number)
    check_used(config, given)
    return entries


def _group(name: str, fields: Any, defaults: T) -> T:
    names = [field.name for field in dataclasses.fields(defaults)]  # type: ignore[arg-type]
    if not isinstance(fields, dict) or set(fields) - set(names):
        raise RequestError(f"{name}={fields!r}: expected an object of some of {', '.join(names)}")
    return dataclasses.replace(defaults, **fields)  # type: ignore[type-var]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise RequestError(f"{name!r}: twice in one line; expected each key once")
    return dict(pairs)
