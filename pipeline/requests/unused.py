"""Options that change nothing beside the others of a request, and are refused where a user gives them."""

from collections.abc import Collection

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError


def check_used(config: GenerateConfig, given: Collection[str]) -> None:
    """Raise RequestError for a key that changes nothing, of those that the user has given for this one request.

    What a file's lines leave out they take from the command line, where it may be meant for other lines: not for these.
    """
    cache, attention = config.cache, config.attention
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
