"""Command line: `python -m pipeline.calibrate`. Makes MagCache's ratios of a checkpoint, from one run of it."""

import dataclasses
import sys
from pathlib import Path

from pipeline.requests.config import OF_RUNS, GenerateConfig
from pipeline.requests.default_model import default_model
from pipeline.requests.errors import RequestError
from splash_workbench import cli
from splash_workbench.files import require_writable_file


@dataclasses.dataclass
class CalibrateConfig(GenerateConfig):
    """Keys of the command line: those of generate, and where the ratios go."""

    output: str | None = None
    overwrite: bool = False


_UNUSED = (
    *OF_RUNS,
    *("prompts", "topology", "stages", "profile", "profile_run", "logdir", "results_path", "quality", "cache.*"),
)


@cli.command(
    "calibrate",
    CalibrateConfig,
    text_or_list=("lora",),
    unused=_UNUSED,
    resolvers={"default_model": default_model},
    interrupted="nothing was written",
)
def main(settings: CalibrateConfig) -> int:
    """Run the command; return its exit code."""
    from pipeline.calibrate.magnitudes import measure_ratios
    from pipeline.checkpoints.checks import check_request, check_weights, checkpoint_of, read_configs
    from pipeline.checkpoints.magcache import ratios_path, read_ratios, write_ratios
    from pipeline.requests.media import check_files
    from pipeline.requests.options import to_parallel
    from pipeline.requests.request import STAGES, to_request
    from pipeline.stages.progress import StageEvent
    from pipeline.stages.stages import StageContext
    from splash_workbench.compile_cache import use_compilation_cache

    request = to_request(settings)
    if request.cache.is_used:
        raise RequestError("cache: all steps are computed, to compare them; leave it out")
    if (left := request.num_inference_steps - request.steps_left_out) < 2:
        which = f", of which strength={request.strength} leaves {left}" if request.steps_left_out else ""
        raise RequestError(f"num_inference_steps={request.num_inference_steps}{which}: expected 2 or more to compare")
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
    checkpoint = checkpoint_of(request, cache_dir)
    path = Path(settings.output) if settings.output else ratios_path(checkpoint)
    require_writable_file(f"output={str(path)!r}", path)
    if path.exists():
        read_ratios(path)  # nothing else is replaced
        if not settings.overwrite:
            raise RequestError(f"{path}: holds ratios already; give another output=FILE, or overwrite=true")
    changes = [name for name in ("lora", "transformer", "quantization", "video") if getattr(request, name)]
    if changes and not settings.output:
        raise RequestError(
            f"{changes[0]}={getattr(settings, changes[0])!r}: the checkpoint's own ratios are of its own weights "
            "and of all steps; expected output=FILE, which cache.ratios= takes"
        )
    configs = read_configs(checkpoint)
    check_request(request, configs)
    check_weights(checkpoint, configs, STAGES, request.encodes)
    check_files(request)
    if settings.compilation_cache:
        use_compilation_cache()
    identities = checkpoint.identities(*STAGES)

    def say(event: StageEvent) -> None:
        done = f"{event.step} of {event.total_steps} steps" if event.phase == "run" else f"{event.phase} ..."
        print(f"  {event.stage}: {done}", file=sys.stderr, flush=True)

    ratios = measure_ratios(StageContext(checkpoint, request, identities, to_parallel(settings)), say)
    names = ("checkpoint", "prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    made_by = {"made_by": "python -m pipeline.calibrate", "weights": identities["denoise"]}
    made_by |= {name: getattr(request, name) for name in (*names, "scheduler", "seed", "dtype")}
    made_by |= {name: getattr(settings, name) for name in changes}
    write_ratios(path, ratios, made_by)
    print("  ".join(f"{ratio:.3f}" for ratio in ratios.ratios))
    print(f"ratios: {path}; cache=magcache takes them" + (f" with cache.ratios={path}" if settings.output else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
