"""The state of a half-done denoise stage on disk: a run that was killed goes on from it and gives the same bits."""

import dataclasses
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.torch
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from pipeline.model.placement import from_first_process
from pipeline.model.torchax_bridge import numpy_to_torch, torch_to_numpy
from splash_workbench.files import atomic_path, remove_leftovers

logger = logging.getLogger(__name__)

STATE_NAME = "denoise.partial.safetensors"
_KEPT = "kept."
_CHECKSUM = "checksum"
#: Without a number of steps of the user's, the state is saved after about so much work: a kill costs no more, and the
#: 30 MB of 81 frames at 720p, fetched and written in a fraction of a second, less than a hundredth of the time.
TARGET_INTERVAL_S = 30.0


@dataclasses.dataclass(frozen=True)
class DenoiseState:
    """Everything the next step depends on.

    step: how many are done. sample: latents [1, frames with padding, channels, height, width] in the weights' dtype.
    x0: of the step before, float32 of the same shape. generator: the noise generator's state, uint8. step_times_s: of
    the steps done. kept: by name, what earlier steps left for the next one; empty where it reads nothing of it.
    """

    step: int
    sample: np.ndarray
    x0: np.ndarray
    generator: np.ndarray
    step_times_s: list[float]
    kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class StateFile:
    """Keep the state of one denoise stage in a file while it runs.

    With several processes all call every method alike; the first reads and writes, so that only it need see the folder.

    folder: of the run. fingerprint: of everything the bits depend on, request and plan; the state of another is never
    taken. every: steps between two savings; 0: none, except when interrupted; None: about TARGET_INTERVAL_S of work.
    resume: False: do not take what is there.
    """

    def __init__(self, folder: Path, fingerprint: str, every: int | None = None, resume: bool = True):
        self._path = folder / STATE_NAME
        self._fingerprint = fingerprint
        self._every = every
        self._resume = resume
        self.resumed_at_step: int | None = None

    def depends_on(self, **choices: Any) -> None:
        """Add what the bits depend on, as JSON has it: the blocks and options that were tuned, by now."""
        text = json.dumps([self._fingerprint, choices], sort_keys=True)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> DenoiseState | None:
        """Read the saved state, None where there is none of this fingerprint."""
        state = _parse(self._data(), self._fingerprint, self._path) if self._resume else None
        if state is not None:
            self.resumed_at_step = state.step
            logger.info("denoise: going on after step %d, from %s", state.step, self._path)
        return state

    def _data(self) -> bytes:
        """Return the file's content as the first process sees it; empty without the file."""
        return from_first_process(self._path.read_bytes() if jax.process_index() == 0 and self._path.exists() else b"")

    def due(self, step: int, step_times_s: list[float]) -> bool:
        """Return whether the state should be saved after this step. step_times_s: of all steps done so far."""
        if self._every is None and len(step_times_s) >= 2:  # the first may be longer
            interval = math.ceil(TARGET_INTERVAL_S / max(step_times_s[-1], 1e-6))
            self._every = int(multihost_utils.broadcast_one_to_all(np.int32(min(interval, 1000))))
        return bool(self._every) and step % (self._every or 1) == 0

    def save(self, state: DenoiseState) -> None:
        """Replace the saved state. A failure (a full disk) is a warning: the run matters more."""
        if jax.process_index() != 0:
            return
        arrays = {**vars(state), "fingerprint": np.frombuffer(self._fingerprint.encode(), np.uint8)}
        arrays |= {_KEPT + name: value for name, value in arrays.pop("kept").items()}
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        arrays[_CHECKSUM] = np.asarray(_checksum(arrays))
        data = safetensors.torch.save({name: numpy_to_torch(array) for name, array in arrays.items()})
        try:
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            logger.warning("denoise: step %d could not be saved in %s (%s)", state.step, self._path, error.strerror)

    def remove(self) -> None:
        """Remove the state, once the stage's own output is safe."""
        if jax.process_index() == 0:
            self._path.unlink(missing_ok=True)
            remove_leftovers(self._path)


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """Return a checksum of arrays, their names and shapes: a disk that returns other bytes says so nowhere else."""
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
    return checksum


def _parse(data: bytes, fingerprint: str, path: Path) -> DenoiseState | None:
    if not data:
        return None
    try:
        arrays = {name: torch_to_numpy(tensor) for name, tensor in safetensors.torch.load(data).items()}
        if int(arrays.pop(_CHECKSUM)) != _checksum(arrays):
            raise ValueError("its checksum is of other content")
        if arrays.pop("fingerprint").tobytes().decode() != fingerprint:
            logger.warning("denoise: %s belongs to another request, plan or version; starting anew", path)
            return None
        step, step_times_s = int(arrays.pop("step")), arrays.pop("step_times_s").tolist()
        kept = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_KEPT)}
        kept = {name.removeprefix(_KEPT): value for name, value in kept.items()}
        return DenoiseState(step=step, step_times_s=step_times_s, kept=kept, **arrays)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        logger.warning("denoise: %s is not readable (%s); starting anew", path, error)
        return None
