"""Command line: `python -m pipeline.quality`. Do the videos follow their prompts, and does a faster way keep them?"""

import sys

from pipeline.quality.config import QualityConfig
from splash_workbench import cli

#: What the captions, the seeds and the candidates say instead, or what is the same for all of them.
_UNUSED = (
    *("seed", "stages", "run_dir", "output_dir", "name", "resume", "checkpoint_every"),
    *("preview_every", "warm_up", "topology", "profile", "profile_run", "logdir", "verbose", "num_videos"),
    *("noise_aug_strength", "video", "strength", "latents", "lora", "transformer", "context_frames"),
    *("context_overlap", "distributed.*", "engine*"),
)


@cli.command("quality", QualityConfig, unused=_UNUSED)
def main(settings: QualityConfig) -> int:
    """Print a table, append records; return 1 where one is over its budget or prompts are not followed enough."""
    from pipeline.quality.judge import judge  # jax and torch: once the options are read

    return judge(settings)


if __name__ == "__main__":
    sys.exit(main())
