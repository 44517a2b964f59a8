"""Makes each variant's videos and compares them with the reference's; what is on record in a folder is not made again.

A folder holds pairs.jsonl, a line a pair, videos/KEY.mp4 of each, and, while anything is left to be compared,
reference/KEY.npy. A key is of all that a pair depends on: after a change of the sources, the weights or the request it
is another, and the pair is made anew.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.checkpoints.checks import checkpoint_of
from pipeline.quality.gate import QualityVariant, measure, to_uint8
from pipeline.quality.render import Made, Wanted, begins_with_drawn, first_frame, first_frame_psnr, variant_videos
from pipeline.requests.request import STAGES, GenerateRequest
from pipeline.runs.records import devices, environment
from pipeline.runs.video import write_mp4
from pipeline.stages.presets import settle_here, settle_parallel
from pipeline.stages.progress import StageEvent
from splash_workbench.files import atomic_path, user_path
from splash_workbench.provenance import source_hash, stable_hash
from splash_workbench.records import jsonl
from splash_workbench.records.quality import PairRecord

#: How many times a difference is enlarged in a pair's video.
GAIN = 8
PAIRS_FILE = "pairs.jsonl"
#: What makes the figures of a pair from its videos.
_MEASURES = tuple(f"pipeline/quality/{name}.py" for name in ("gate", "learned", "read_back", "render"))
#: Told of a part of a video that is done, and what of it.
Tell = Callable[[float, str], None]


@dataclasses.dataclass
class Pairs:
    """The videos of each prompt and seed, by the reference and by variants of it.

    folder: see above; None: nothing is kept, and the reference's videos stay in memory. with_lpips, with_readings: see
    `gate.measure`. environment, devices: where this is.
    """

    reference: QualityVariant
    wanted: Sequence[Wanted]
    folder: Path | None
    cache_dir: Path | None
    with_lpips: bool
    with_readings: bool

    def __post_init__(self) -> None:
        self.environment, self.devices = environment(), devices()
        self._kept: dict[str, np.ndarray] = {}  # the reference's, by key, without a folder
        self._known_keys: dict[str, list[str]] = {}  # by variant
        records = jsonl.read(self.folder / PAIRS_FILE, PairRecord) if self.folder is not None else []
        self._on_record = {(record.candidate, record.key): record for record in records}

    def settled(self, variant: QualityVariant) -> GenerateRequest:
        """Return a variant's request with what its quality chooses in it. Raises RequestError."""
        return settle_here(variant.request, checkpoint_of(variant.request, self.cache_dir))

    def missing(self, variant: QualityVariant) -> list[int]:
        """Return the numbers of the pairs that are not on record. Raises RequestError, CheckpointError."""
        return [index for index, key in enumerate(self._keys(variant)) if not self._is_there(variant, key)]

    def compare(self, variant: QualityVariant, tell: Tell = lambda part, text: None) -> list[PairRecord]:
        """Return a record for each of the wanted, made where there is none. Raises what the stages raise."""
        keys, missing = self._keys(variant), self.missing(variant)
        self._make_references(missing, tell)
        reference_keys = self._keys(self.reference)
        if variant is not self.reference and missing:
            videos = variant_videos(variant, self._of(missing), self.cache_dir, functools.partial(_tell_step, tell))
            for index, made in zip(missing, videos, strict=True):
                self._add(variant, index, made, self._reference(reference_keys[index]))
                tell(1, "")
        return [self._on_record[variant.name, key] for key in keys]

    def references(self) -> Iterator[np.ndarray]:
        """Return the reference's videos, float32 [frames, height, width, 3], made where they are not kept."""
        self._make_references(range(len(self.wanted)), lambda part, text: None)
        return (self._reference(key) for key in self._keys(self.reference))

    def drop_references(self) -> None:
        """Delete the reference's frames: all pairs are on record."""
        self._kept.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder / "reference", ignore_errors=True)

    def references_to_make(self, missing: Sequence[int]) -> list[int]:
        """Return which of the reference's videos pairs of these numbers need, and are not kept."""
        keys = self._keys(self.reference)
        return [index for index in missing if not self._has_reference(keys[index])]

    def _make_references(self, missing: Sequence[int], tell: Tell) -> None:
        """Make the reference's videos that pairs of these numbers need."""
        keys, needed = self._keys(self.reference), self.references_to_make(missing)
        if not needed:
            return
        request = self.reference.request
        # Of captions alone: to ask imports diffusers.
        drawn = self.with_readings and begins_with_drawn(request, checkpoint_of(request, self.cache_dir))
        videos = variant_videos(self.reference, self._of(needed), self.cache_dir, functools.partial(_tell_step, tell))
        for index, made in zip(needed, videos, strict=True):
            self._keep_reference(keys[index], made.frames)
            if not self._is_there(self.reference, keys[index]):
                first = first_frame_psnr(made.frames, first_frame(request, *self.wanted[index])) if drawn else None
                self._add(self.reference, index, made, made.frames, first)
            tell(1, "")

    def _add(
        self, variant: QualityVariant, index: int, made: Made, expected: np.ndarray, first_frame_db: float | None = None
    ) -> None:
        """Compare a video, and put it on record: its file first, so that what is on record is there."""
        key, (prompt, seed) = self._keys(variant)[index], self.wanted[index]
        record = PairRecord(
            key=key,
            candidate=variant.name,
            prompt=prompt,
            seed=seed,
            denoise_time_s=made.denoise_time_s,
            steps_computed=made.steps_computed,
            first_frame_db=first_frame_db,
            **measure(made.frames, expected, self.with_lpips, self.with_readings),
        )
        if self.folder is not None:
            shown = made.frames if variant is self.reference else side_by_side(expected, made.frames)
            write_mp4(self.folder / video_path(key), to_uint8(shown), variant.request.fps)
            jsonl.append(self.folder / PAIRS_FILE, record)
        self._on_record[variant.name, key] = record

    def _of(self, indices: Sequence[int]) -> list[Wanted]:
        return [self.wanted[index] for index in indices]

    def _is_there(self, variant: QualityVariant, key: str) -> bool:
        there = self.folder is None or (self.folder / video_path(key)).exists()
        return there and (variant.name, key) in self._on_record

    def _keys(self, variant: QualityVariant) -> list[str]:
        """Return the key of each pair."""
        if variant.name not in self._known_keys:
            made_by = jsonl.encode(self.environment)
            names = ("versions", "flags", "kernel_hash", "backend_hash", "host")
            variants = [self.reference] if variant is self.reference else [self.reference, variant]
            depends_on = {
                "variants": [self._dependencies(each) for each in variants],
                "measured": [self.with_lpips, self.with_readings, source_hash(_MEASURES)],
                "devices": jsonl.encode(self.devices),
                **{name: made_by[name] for name in names},
            }
            text = json.dumps(depends_on, sort_keys=True)
            self._known_keys[variant.name] = [stable_hash(text + json.dumps(one)) for one in self.wanted]
        return self._known_keys[variant.name]

    def _dependencies(self, variant: QualityVariant) -> dict[str, object]:
        """Return what a variant's videos depend on besides prompt and seed."""
        checkpoint = checkpoint_of(variant.request, self.cache_dir)
        request = settle_here(variant.request, checkpoint)
        fields = dataclasses.asdict(dataclasses.replace(request, prompt="", seed=0))
        if request.cache.ratios is not None:
            fields["cache"]["ratios"] = stable_hash(user_path(request.cache.ratios).read_text(encoding="utf-8"))
        if request.image is not None:
            fields["image"] = stable_hash(user_path(request.image).read_bytes().hex())
        parallel = dataclasses.asdict(settle_parallel(variant.parallel, request))
        return {"request": fields, "parallel": parallel, "weights": checkpoint.identities(*STAGES)}

    def _reference_path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / "reference" / f"{key}.npy"

    def _has_reference(self, key: str) -> bool:
        path = self._reference_path(key)
        if path is None:
            return key in self._kept
        try:
            np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # absent, or torn: it is made again
            return False
        return True

    def _keep_reference(self, key: str, frames: np.ndarray) -> None:
        path = self._reference_path(key)
        if path is None:
            self._kept[key] = frames
        else:
            with atomic_path(path) as temporary:
                np.save(temporary, frames)

    def _reference(self, key: str) -> np.ndarray:
        path = self._reference_path(key)
        return self._kept[key] if path is None else np.load(path)


def video_path(key: str) -> Path:
    """Return where the video of a pair is, from the folder."""
    return Path("videos", f"{key}.mp4")


def side_by_side(reference: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Return the reference, the video, and GAIN times their difference on grey, in one video: they play in step."""
    difference = 0.5 + GAIN * (video - reference)
    return np.concatenate([reference, video, difference.clip(0, 1)], axis=2)


def _tell_step(tell: Tell, event: StageEvent) -> None:
    """Tell which denoising step a video is in; it is done where `tell` says so."""
    tell(0, f"step {event.step} of {event.total_steps}" if event.phase == "run" else f"{event.phase} ...")
