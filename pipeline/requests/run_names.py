"""Names of the folders that runs leave."""

import dataclasses
import hashlib
import json
import re
import string

from pipeline.requests.errors import RequestError
from pipeline.requests.models import MODEL_FIELDS
from pipeline.requests.request import GenerateRequest
from pipeline.requests.reuse import CacheOptions

DEFAULT_NAME = "{slug}-{width}x{height}x{num_frames}-seed{seed}-{digest}"
_REQUEST_FIELDS = ("seed", *MODEL_FIELDS)
NAME_FIELDS = ("slug", "digest", "line", *_REQUEST_FIELDS)
_LATER = {
    **{"image": None, "noise_aug_strength": 0.0, "video": None, "strength": 0.8},
    **{"latents": None, "lora": (), "transformer": None, "context_frames": None, "context_overlap": 16},
    **{"quality": "exact", "cache": dataclasses.asdict(CacheOptions())},
    "quantization": None,
}
_MAX_LENGTH = 200  # bytes; file systems take 255, and temporary names are longer


def run_name(request: GenerateRequest, name: str | None = None, line: int = 1) -> str:
    """Return a folder's name: `name` with its {fields} filled in, DEFAULT_NAME without it.

    Fields are those of NAME_FIELDS: slug is the beginning of the prompt, digest tells apart what differs in anything
    but fps, line is that of the batch's file. Raises RequestError.
    """
    template = DEFAULT_NAME if name is None else name
    values = {field: getattr(request, field) for field in _REQUEST_FIELDS}
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-") or "video"
    decisive = {field: value for field, value in dataclasses.asdict(request).items() if field != "fps"}
    # What came later is left out where it is not used: folders of earlier versions keep their names.
    decisive = {field: value for field, value in decisive.items() if field not in _LATER or value != _LATER[field]}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    values |= {"slug": slug, "digest": digest, "line": line}
    try:
        for _, field, spec, _ in string.Formatter().parse(template):
            if field is not None and field not in values:
                raise ValueError(f"unknown field {{{field}}}")
            _check_width(spec or "")
        filled = template.format(**values)
        length = len(filled.encode())  # UnicodeEncodeError is a ValueError
    except (ValueError, AttributeError, TypeError, OverflowError) as error:  # TypeError: not a string
        fields = ", ".join(NAME_FIELDS)
        raise RequestError(f"name={name!r}: {error}; expected text in which {{...}} are of {fields}") from error
    if filled in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", filled) or length > _MAX_LENGTH:
        raise RequestError(f"name={filled!r}: expected the name of one folder, at most {_MAX_LENGTH} bytes long")
    return filled


def _check_width(spec: str) -> None:
    """Raise ValueError for what would be longer than a name may be: it is said before the text is made."""
    if "{" in spec:  # whose value would be a width
        raise ValueError(f"a field inside the format {spec!r}")
    if any(len(digits) > 9 or int(digits) > _MAX_LENGTH for digits in re.findall(r"\d+", spec)):
        raise ValueError(f"a width of more than {_MAX_LENGTH} in {spec[:20]!r}")
