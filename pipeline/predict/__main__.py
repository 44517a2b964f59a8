"""Command line: `python -m pipeline.predict topology=v6e-8`. What a video costs on chips that are not here."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.checkpoints.published import part_configs
from pipeline.predict.planner import Predictor
from pipeline.predict.report import compact, make_report, print_report
from pipeline.predict.timelines import write_timelines
from pipeline.requests.config import GenerateConfig, request_to_dict, to_parallel, to_request
from pipeline.requests.errors import PipelineError
from pipeline.requests.request import parse_stages
from splash_workbench import cli
from splash_workbench.accelerator import quiet_jax_without_accelerator
from splash_workbench.cli import decode_literal, protect_literals
from splash_workbench.files import append_json_line, write_json


@dataclasses.dataclass
class PredictConfig(GenerateConfig):
    """Keys of the command line: those of generate, and these."""

    topology: str = "v6e-8"
    json: str | None = None
    timeout_s: float = 1200.0
    results_path: str | None = "results/predict.jsonl"


def main() -> int:
    """Run the command; returns its exit code."""
    quiet_jax_without_accelerator()
    cli.store_schema("predict_schema", PredictConfig)
    OmegaConf.register_new_resolver("literal", decode_literal, replace=True)
    sys.argv[1:] = protect_literals(sys.argv[1:])
    return cli.run("predict", _command)


def _command(config: DictConfig) -> int:
    settings: Any = OmegaConf.to_object(config)
    settings.prompt = settings.prompt or "any"  # its length is padded away
    try:
        request = to_request(settings)
        stages = parse_stages(settings.stages)
        cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
        configs, source = part_configs(
            request.checkpoint, lambda: resolve_checkpoint(request.checkpoint, request.revision, cache_dir)
        )
        predictor = Predictor(
            topology=settings.topology,
            request=request_to_dict(request),
            configs=configs,
            timeout_s=settings.timeout_s,
            say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        )
        prediction = predictor.predict(stages, to_parallel(settings), request.do_classifier_free_guidance)
        report = make_report(request, settings.topology, prediction, source)
    except PipelineError as error:
        raise cli.UserError(str(error)) from error
    print_report(report)
    if settings.json is not None:
        write_json(Path(settings.json), report)
    if settings.results_path is not None:
        append_json_line(Path(settings.results_path), compact(report))
    if settings.profile:
        print("\n".join(write_timelines(report, Path(settings.logdir), settings.profile_run)))
    if prediction.failures:
        raise cli.UserError("; ".join(prediction.failures.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
