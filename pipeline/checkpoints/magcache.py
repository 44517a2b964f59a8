"""MagCache's ratios of a checkpoint: how much what the blocks add grows from step to step, as a run has shown."""

import dataclasses
import functools
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints.loading import STAGE_PARTS, Checkpoint
from pipeline.requests.errors import RequestError
from splash_workbench.files import write_json
from splash_workbench.provenance import user_cache_dir

logger = logging.getLogger(__name__)

FILE_NAME = "magcache.json"
_HOW = "python -m pipeline.calibrate makes them"


def ratios_path(checkpoint: Checkpoint) -> Path:
    """Return where a checkpoint's ratios are kept: in its folder, of one on the Hub in the user's cache folder."""
    if checkpoint.folder is not None:
        return checkpoint.folder / FILE_NAME
    assert checkpoint.repo_id is not None
    return user_cache_dir() / "magcache" / checkpoint.repo_id.replace("/", "--") / FILE_NAME


def own_ratios(checkpoint: Checkpoint) -> Path:
    """Return `ratios_path`, and tell once where the ratios there were made with other weights than are there now."""
    path = ratios_path(checkpoint)
    try:
        made_with = json.loads(path.read_bytes()).get("weights")
    except (OSError, ValueError, AttributeError):  # which `read_ratios` says
        return path
    if made_with != dataclasses.replace(checkpoint, transformer=None).identity(*STAGE_PARTS["denoise"]):
        _tell_of_others(path)
    return path


@functools.cache
def _tell_of_others(path: Path) -> None:
    logger.warning("cache=magcache: the ratios at %s are of other weights than are there now; %s", path, _HOW)


@dataclasses.dataclass(frozen=True)
class MagnitudeRatios:
    """Of a run with these timesteps, falling: what the blocks add in each, over that in the one before; the first is 1.

    Raises ValueError unless they are such.
    """

    timesteps: tuple[float, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        for values in (self.timesteps, self.ratios):
            if len(values) != len(self.ratios) or not all(type(x) in (int, float) and math.isfinite(x) for x in values):
                raise ValueError("expected timesteps and ratios, a number of each a step")
        if len(self.ratios) < 2 or min(self.ratios) <= 0:
            raise ValueError("expected ratios above 0, of two steps or more")
        if any(after >= before for before, after in itertools.pairwise(self.timesteps)):
            raise ValueError("expected timesteps that fall")

    def at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the ratios of a run with other timesteps, [steps], falling: the magnitude is taken between theirs.

        Beyond the last it goes on as between the last two.
        """
        logs = np.cumsum(np.log(self.ratios))
        slope = (logs[-1] - logs[-2]) / (self.timesteps[-1] - self.timesteps[-2])
        known, end = np.interp(timesteps, self.timesteps[::-1], logs[::-1]), np.minimum(timesteps, self.timesteps[-1])
        known = known + slope * (end - self.timesteps[-1])
        return np.exp(np.diff(known, prepend=known[:1]))


def read_ratios(path: Path) -> MagnitudeRatios:
    """Read what `write_ratios` wrote. Raises RequestError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return MagnitudeRatios(tuple(content["timesteps"]), tuple(content["ratios"]))
    except OSError as error:
        raise RequestError(f"cache=magcache: no ratios at {path} ({error.strerror}); {_HOW}") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise RequestError(f"cache=magcache: {path} holds no ratios ({error!r}); {_HOW}") from error


def write_ratios(path: Path, ratios: MagnitudeRatios, made_by: dict[str, Any]) -> None:
    """Write ratios, and what they were made with, to a file that `read_ratios` reads."""
    write_json(path, {**made_by, **dataclasses.asdict(ratios)})
