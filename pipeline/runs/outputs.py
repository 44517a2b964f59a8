"""Stages' outputs on disk, and whether they belong to the request at hand.

A stage's output is `<stage>.safetensors` (the arrays) and `<stage>.json` (what they were made from, and timings). Both
carry the same fingerprint, so that a crash between the two writes is noticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.checkpoints.lora import lora_identity
from pipeline.model.torchax_bridge import numpy_to_torch, torch_to_numpy
from pipeline.requests.errors import StageOutputError
from pipeline.requests.media import content_digest, file_digests
from pipeline.requests.request import STAGES, GenerateRequest, Stage
from pipeline.stages.progress import StageTimings
from splash_workbench.files import atomic_path, write_json
from splash_workbench.records import jsonl

SCHEMA_VERSION = 1
#: What reading a JSON file raises where it is damaged, whatever it holds instead.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)
#: Stage -> the one whose output it takes.
_BEFORE: Mapping[Stage, Stage | None] = dict(zip(STAGES, (None, *STAGES), strict=False))
_MAPPINGS = ("attention", "compiler_options", "parallel")  # what a stage's JSON may hold besides, for the record


@dataclasses.dataclass(frozen=True)
class StageKey:
    """Everything a stage's output depends on, by readable names. Equal keys mean the same output."""

    stage: Stage
    fields: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        described = json.dumps([SCHEMA_VERSION, self.stage, self.fields], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def differences(self, saved: Mapping[str, Any]) -> str:
        """Say how saved fields differ from these, for a message."""
        pairs = {name: (saved.get(name), self.fields.get(name)) for name in sorted({*self.fields, *saved})}
        return "; ".join(f"{name}: saved {a!r}, wanted {b!r}" for name, (a, b) in pairs.items() if a != b)


def stage_key(request: GenerateRequest, stage: Stage, identities: Mapping[Stage, str]) -> StageKey:
    """Return the key of a stage's output. identities: of the checkpoint's parts, see `needed_stages`. RequestError."""
    guided = request.do_classifier_free_guidance
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt if guided else None,
        "dtype": request.dtype,
        "text_weights": identities["text"],
    }
    if stage != "text":
        names = ("height", "width", "num_frames", "num_inference_steps", "seed", "scheduler")
        fields |= {
            **{name: getattr(request, name) for name in names},
            "guidance_scale": request.guidance_scale if guided else None,
            "use_dynamic_cfg": request.use_dynamic_cfg and guided,
            "attention": dataclasses.asdict(request.attention),
            "denoise_weights": identities["denoise"],
            **_input_fields(request, identities),
        }
    if stage == "vae":
        fields["vae_weights"] = identities["vae"]
    return StageKey(stage, fields)


def _input_fields(request: GenerateRequest, identities: Mapping[Stage, str]) -> dict[str, Any]:
    """Return what further inputs of the denoise stage are, of those that a request has: outputs without stay as before.

    Raises RequestError for a file that cannot be read.
    """
    fields: dict[str, Any] = file_digests(request)
    if request.image is not None:
        fields |= {"noise_aug_strength": request.noise_aug_strength, "encoder_weights": identities["vae"]}
    if request.video is not None:
        fields |= {"strength": request.strength, "encoder_weights": identities["vae"]}
    if request.context_frames is not None:
        fields |= {"context_frames": request.context_frames, "context_overlap": request.context_overlap}
    if request.cache.is_used:
        cache = dataclasses.asdict(request.cache)
        if request.cache.ratios is not None:
            cache["ratios"] = content_digest("cache.ratios", request.cache.ratios)
        fields["cache"] = cache
    if request.lora:
        fields["lora"] = list(lora_identity(request.lora))
    if request.int8_linears:
        fields["quantization"] = "int8"
    return fields


def save_stage(folder: Path, key: StageKey, arrays: Mapping[str, np.ndarray], details: Mapping[str, Any]) -> None:
    """Write a stage's arrays and what they belong to. details: more for the JSON file, e.g. timings."""
    tensors = {name: numpy_to_torch(array) for name, array in arrays.items()}
    with atomic_path(folder / f"{key.stage}.safetensors") as temporary:
        try:
            save_file(tensors, temporary, metadata={"fingerprint": key.fingerprint})
        except SafetensorError as error:  # a full disk
            raise StageOutputError(f"{key.stage}: cannot be saved in {folder} ({error}); make room there") from error
        checksum = _checksum(temporary)
    described = {
        "schema_version": SCHEMA_VERSION,
        "stage": key.stage,
        "fingerprint": key.fingerprint,
        "checksum": checksum,
        "request": dict(key.fields),
        "arrays": {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()},
        **details,
    }
    write_json(folder / f"{key.stage}.json", described)


def mark_on_record(folder: Path, stage: Stage) -> None:
    """Say in a stage's JSON that a record has its timings. Where it cannot be written, the next has them too."""
    path = folder / f"{stage}.json"
    with contextlib.suppress(*UNREADABLE):
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "on_record": True})


def check_stage(folder: Path, key: StageKey) -> dict[str, Any]:
    """Return a saved output's JSON, timings marked reused. Raises StageOutputError unless it is whole and of `key`."""
    stage, path = key.stage, folder / f"{key.stage}.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        saved_fields, fingerprint = dict(described["request"]), described["fingerprint"]
        described["timings"] = reused_timings(described["timings"])
        for name in _MAPPINGS:
            if described.get(name) is not None:
                described[name] = dict(described[name])
    except FileNotFoundError as error:
        raise StageOutputError(f"{stage}: no saved output in {folder}") from error
    except UNREADABLE as error:
        raise StageOutputError(f"{stage}: {path} is not readable ({error})") from error
    if fingerprint != key.fingerprint:
        why = key.differences(saved_fields) or f"schema: saved {described.get('schema_version')}, now {SCHEMA_VERSION}"
        raise StageOutputError(f"{stage}: the output in {folder} was made for another request ({why})")
    with _open(folder, stage) as file:
        if (file.metadata() or {}).get("fingerprint") != fingerprint:
            raise StageOutputError(f"{stage}: {stage}.safetensors and {stage}.json in {folder} do not belong together")
    # Outputs of an earlier version have none.
    if described.get("checksum", checksum := _checksum(folder / f"{stage}.safetensors")) != checksum:
        raise StageOutputError(f"{stage}: {stage}.safetensors in {folder} is damaged (its checksum is another)")
    return described


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def load_stage(folder: Path, key: StageKey) -> dict[str, np.ndarray]:
    """Load a stage's saved arrays. Raises StageOutputError unless they are whole and belong to `key`."""
    check_stage(folder, key)
    with _open(folder, key.stage) as file:
        return {name: torch_to_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def load_inputs(folder: Path, keys: Mapping[Stage, StageKey], stage: Stage) -> dict[str, np.ndarray]:
    """Load what a stage takes from the one before, nothing for the first. StageOutputError where it is not there."""
    before = _BEFORE[stage]
    if before is None:
        return {}
    with _saying_how(before, stage):
        return load_stage(folder, keys[before])


def check_inputs(folder: Path, keys: Mapping[Stage, StageKey], stages: Sequence[Stage], resume: bool) -> None:
    """Raise StageOutputError where one of the stages to run needs a left-out one's output, and none that fits is there.

    resume: a stage with an output of its own takes that, and needs nothing.
    """
    for stage in stages:
        before = _BEFORE[stage]
        if before is None or before in stages:
            continue
        if resume:
            with contextlib.suppress(StageOutputError):
                check_stage(folder, keys[stage])
                continue
        with _saying_how(before, stage):
            check_stage(folder, keys[before])


@contextlib.contextmanager
def _saying_how(before: Stage, stage: Stage) -> Iterator[None]:
    """Add to a StageOutputError how the output of the stage before comes to be there."""
    try:
        yield
    except StageOutputError as error:
        raise StageOutputError(f"{error}; run that stage too (stages={before},{stage}), or name its run_dir") from error


def reused_timings(fields: Mapping[str, Any]) -> StageTimings:
    """Return saved timings, marked as reused. Raises one of UNREADABLE where they are none."""
    return jsonl.decode({**fields, "reused": True}, StageTimings)


def _open(folder: Path, stage: Stage) -> Any:
    path = folder / f"{stage}.safetensors"
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise StageOutputError(f"{stage}: {path} is not readable ({error})") from error
