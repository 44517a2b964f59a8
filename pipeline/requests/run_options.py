"""Options of a run that do not change its result."""

import dataclasses

from pipeline.requests.errors import RequestError
from pipeline.requests.parallel_options import ParallelOptions

MAX_EVERY = 1000  # steps


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its result.

    resume: take saved outputs, and the state of a half-done denoise stage, where they belong to exactly this request.
    parallel: how to lay the work out over the devices. checkpoint_every: denoising steps between two savings of the
    state; None: by time, see `pipeline.stages.resume`; 0: only when interrupted. preview_every: denoising steps between
    two pictures; 0: none. Raises RequestError.
    """

    resume: bool = True
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    checkpoint_every: int | None = None
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name, none in (("checkpoint_every", "only when interrupted"), ("preview_every", "none")):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_EVERY:
                raise RequestError(f"{name}={value}: expected steps from 1 to {MAX_EVERY}, or 0: {none}")
