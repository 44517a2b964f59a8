"""Command line: `python -m pipeline.quality`. Do the videos follow their prompts, and does a faster way keep them?"""

import sys

from pipeline.quality.config import QualityConfig
from pipeline.requests.config import OF_RUNS
from splash_workbench import cli

#: What the captions, the seeds and the candidates say instead, or what is the same for all of them.
_UNUSED = (
    *OF_RUNS,
    *("seed", "stages", "topology", "profile", "profile_run", "logdir", "verbose", "noise_aug_strength"),
    *("video", "strength", "latents", "lora", "transformer"),
)


@cli.command("quality", QualityConfig, unused=_UNUSED)
def main(settings: QualityConfig) -> int:
    """Print a table, append records; return 1 where one is over its budget or prompts are not followed enough."""
    from pipeline.quality.judge import judge  # jax and torch: once the options are read

    return judge(settings)


if __name__ == "__main__":
    sys.exit(main())
