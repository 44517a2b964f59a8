"""What denoising steps may reuse of earlier ones, and the presets of quality that choose it for the user.

Sources of the formulas, all under Apache-2.0: TeaCache (arXiv:2411.19108), whose polynomials for CogVideoX are those of
github.com/ali-vilab/TeaCache; MagCache (arXiv:2506.09045); first-block cache (github.com/chengzeyi/ParaAttention).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pipeline.requests.errors import RequestError, require_number
from pipeline.requests.limits import MAX_STEPS

CacheMethod = Literal["none", "teacache", "magcache", "first_block"]
Quality = Literal["exact", "fast", "fastest"]

#: Published checkpoint -> polynomial, highest power first: from the relative change of the timestep's embedding to that
#: of the model's output.
TEACACHE_COEFFICIENTS: Mapping[str, tuple[float, ...]] = {
    "zai-org/CogVideoX-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "zai-org/CogVideoX-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "zai-org/CogVideoX-5b-I2V": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "zai-org/CogVideoX1.5-5B": (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "zai-org/CogVideoX1.5-5B-I2V": (122.842302, -104.088754, 26.2981677, -0.306009921, 0.0371213220),
}
#: (checkpoint, threshold) -> the part of 50 steps that TeaCache's authors compute, by the times that they report on an
#: H100 (README of TeaCache4CogVideoX1.5: 465, 322, 260 and 204 s; from an image 475, 316, 239 and 204 s). The schedule
#: itself follows from weights, which a prediction does not read.
REPORTED_FRACTIONS: Mapping[tuple[str, float], float] = {
    ("zai-org/CogVideoX1.5-5B", 0.1): 322 / 465,
    ("zai-org/CogVideoX1.5-5B", 0.2): 260 / 465,
    ("zai-org/CogVideoX1.5-5B", 0.3): 204 / 465,
    ("zai-org/CogVideoX1.5-5B-I2V", 0.1): 316 / 475,
    ("zai-org/CogVideoX1.5-5B-I2V", 0.2): 239 / 475,
    ("zai-org/CogVideoX1.5-5B-I2V", 0.3): 204 / 475,
}
#: Where the user gives none: of TeaCache's authors the middle one, of diffusers the two others.
DEFAULT_THRESHOLDS: Mapping[str, float] = {"none": 0.0, "teacache": 0.2, "magcache": 0.06, "first_block": 0.05}
MAX_THRESHOLD = 10


@dataclasses.dataclass
class CacheConfig:
    """The group `cache` of configurations: see `CacheOptions`. coefficients: a list."""

    method: str | None = None
    threshold: float | None = None
    max_reused: int = 3
    first_steps: float = 0.2
    coefficients: Any = None
    ratios: str | None = None
    unconditional_every: int | None = None


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """Which denoising steps reuse what the transformer's blocks added in an earlier one, instead of running them.

    method: None, as the request's quality says; "none", every step runs them; "teacache", by how much the timestep's
    embedding has changed, and "magcache", by how the blocks' outputs shrank in a run of before: both are known before
    the run; "first_block", by how much the first block's output has changed. threshold: of the change since the last
    step that ran them; None, the method's own. max_reused: steps in a row, and first_steps: the fraction at the
    beginning that always runs them, both of magcache. coefficients: teacache's polynomial, highest power first; None,
    the published one. ratios: magcache's, a file that `python -m pipeline.calibrate` has made; None, the one beside the
    checkpoint. unconditional_every: of the steps that run them, as many apart are those that also run the negative
    prompt; the others reuse how far guidance went; None, as the quality says, or 1. Raises RequestError.
    """

    method: CacheMethod | None = None
    threshold: float | None = None
    max_reused: int = 3
    first_steps: float = 0.2
    coefficients: tuple[float, ...] | None = None
    ratios: str | None = None
    unconditional_every: int | None = None

    def __post_init__(self) -> None:
        methods = get_args(CacheMethod)
        if self.method is not None and self.method not in methods:
            raise RequestError(f"cache.method={self.method!r}: expected one of {', '.join(methods)}, or null")
        require_number("cache.threshold", self.threshold, 0, MAX_THRESHOLD, int | float, optional=True)
        require_number("cache.max_reused", self.max_reused, 1, MAX_STEPS)
        require_number("cache.first_steps", self.first_steps, 0, 1, int | float)
        require_number("cache.unconditional_every", self.unconditional_every, 1, MAX_STEPS, optional=True)
        if self.coefficients is not None:
            values = self.coefficients
            numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
            if not numbers or not values or not all(map(math.isfinite, values)):
                raise RequestError(f"cache.coefficients={values!r}: expected a list of numbers, highest power first")
            object.__setattr__(self, "coefficients", tuple(map(float, values)))
        if self.ratios is not None and not (isinstance(self.ratios, str) and self.ratios.strip()):
            raise RequestError(
                f"cache.ratios={self.ratios!r}: expected a file of python -m pipeline.calibrate, or null"
            )
        for name, method in (("coefficients", "teacache"), ("ratios", "magcache")):
            if getattr(self, name) is not None and self.method != method:
                raise RequestError(f"cache.{name}={getattr(self, name)!r}: only with cache={method}")

    @property
    def is_used(self) -> bool:
        """Return whether any step reuses anything."""
        return self.method not in (None, "none") or (self.unconditional_every or 1) > 1


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a quality chooses where the request leaves it open.

    int8: of the linears, and of attention where the kernel runs. teacache, magcache: thresholds; the first where the
    checkpoint's polynomial is known, else the second.
    """

    int8: bool = False
    teacache: float | None = None
    magcache: float | None = None
    unconditional_every: int = 1

    def cache(self, given: CacheOptions, checkpoint: str) -> CacheOptions:
        """Return the options with what is None in them filled in, for a checkpoint of this name."""
        method, threshold, every = given.method, given.threshold, given.unconditional_every
        if method is None:
            known = checkpoint in TEACACHE_COEFFICIENTS
            method = "none" if self.teacache is None else "teacache" if known else "magcache"
        if threshold is None:
            threshold = {"teacache": self.teacache, "magcache": self.magcache}.get(method)
        threshold = DEFAULT_THRESHOLDS[method] if threshold is None else threshold
        coefficients = given.coefficients
        if method == "teacache" and coefficients is None:
            if checkpoint not in TEACACHE_COEFFICIENTS:
                raise RequestError(
                    f"cache=teacache: no polynomial is published for checkpoint={checkpoint!r}; expected "
                    "cache.coefficients=[...], or cache=magcache after python -m pipeline.calibrate"
                )
            coefficients = TEACACHE_COEFFICIENTS[checkpoint]
        every = self.unconditional_every if every is None else every
        return dataclasses.replace(
            given, method=method, threshold=threshold, coefficients=coefficients, unconditional_every=every
        )


PRESETS: Mapping[str, Preset] = {
    "exact": Preset(),
    "fast": Preset(int8=True, teacache=0.2, magcache=0.12),
    "fastest": Preset(int8=True, teacache=0.3, magcache=0.24, unconditional_every=2),
}
