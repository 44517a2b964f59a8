"""Loaded stages, kept between runs."""

import gc
import logging
from collections.abc import Callable, Hashable
from typing import Any

from . import host

logger = logging.getLogger(__name__)

#: Part of the device's memory that may be taken when a stage begins; above it, stages that were not used for longest
#: are freed. The rest is for the stage's activations.
_HELD_FRACTION = 0.5

_stages: dict[Hashable, Any] = {}  # least recently used first
#: What `release` calls, too, so that other modules drop what they keep.
on_release: list[Callable[[], None]] = []


def loaded_stage(key: Hashable, load: Callable[[], Any]) -> Any:
    """Return the stage of this key, loaded if it is not here. Others stay as long as they leave room on the device."""
    if key in _stages:
        stage = _stages.pop(key)
    else:
        _make_room()
        stage = load()
    _stages[key] = stage
    _make_room(keep=1)
    host.call_when_unloading(release)
    return stage


def release() -> None:
    """Drop every stage: weights and compiled programs."""
    if _stages:
        logger.info("freeing %d loaded stages", len(_stages))
    for drop in (_stages.clear, *on_release):
        drop()
    gc.collect()  # torch modules are cyclic


def _make_room(keep: int = 0) -> None:
    while len(_stages) > keep and _held_fraction() > _HELD_FRACTION:
        oldest = next(iter(_stages))
        logger.info("freeing %s, to make room", oldest)
        del _stages[oldest]
        gc.collect()


def _held_fraction() -> float:
    """How much of the first device's memory is taken; 0 where JAX cannot tell (on the CPU)."""
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    return statistics["bytes_in_use"] / statistics["bytes_limit"] if statistics else 0.0
