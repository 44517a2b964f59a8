"""Options that change nothing beside the others of a request, and are refused where a user gives them."""

from collections.abc import Collection
from typing import TypeGuard

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.models import fill_in_defaults


def check_used(config: GenerateConfig, given: Collection[str]) -> None:
    """Raise RequestError for a key that changes nothing, of those that the user has given for this one request.

    What a file's lines leave out they take from the command line, where it may be meant for other lines: not for these.
    """
    cache, attention = config.cache, config.attention
    sizes = fill_in_defaults(vars(config), config.model)
    guidance, frames = sizes["guidance_scale"], sizes["num_frames"]
    leaves_out = cache.unconditional_every is not None and cache.unconditional_every > 1
    if leaves_out and {"cache", "cache.unconditional_every"} & set(given) and _is_number(guidance) and guidance <= 1:
        raise RequestError(
            f"cache.unconditional_every={cache.unconditional_every!r}: only with guidance_scale above 1 (it is "
            f"{guidance:g}), which computes a negative prompt to be left out; leave it out"
        )
    window = config.context_frames
    if "context_frames" in given and _is_number(window) and _is_number(frames) and window > frames:
        raise RequestError(
            f"context_frames={window!r}: only up to num_frames (it is {frames}), which the model then sees at a time; "
            "leave it out"
        )
    by_quality = cache.method is None and config.quality != "exact"
    reuses = cache.method not in (None, "none") or by_quality
    magcache = (cache.method == "magcache" or by_quality, "with cache=magcache, or quality=fast")
    the_kernel = (attention.implementation != "xla", "for the kernel, which attention.implementation=xla does not run")
    for key, value, used, instead in (
        ("strength", config.strength, config.video is not None, "with video=..."),
        ("context_overlap", config.context_overlap, config.context_frames is not None, "with context_frames=..."),
        ("cache.threshold", cache.threshold, reuses, "with cache=teacache, magcache or first_block, or quality=fast"),
        ("cache.max_reused", cache.max_reused, *magcache),
        ("cache.first_steps", cache.first_steps, *magcache),
        ("cache.ratios", cache.ratios, cache.method == "magcache", "with cache=magcache"),
        ("cache.coefficients", cache.coefficients, cache.method == "teacache", "with cache=teacache"),
        ("attention.block_sizes", attention.block_sizes, *the_kernel),
        ("attention.variant", attention.variant, *the_kernel),
    ):
        if key in given and value is not None and not used:
            raise RequestError(f"{key}={value!r}: only {instead}; leave it out")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)  # a line of a file may hold anything, which the request refuses
