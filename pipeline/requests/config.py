"""The schema of configs/generate.yaml, and its one conversion to the frozen types."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.requests.errors import RequestError
from pipeline.requests.plans import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.requests.run_options import RunOptions
from splash_attn.types import BlockSizes, Variant


@dataclasses.dataclass
class AttentionConfig:
    """See `AttentionOptions`. block_sizes, variant: None, or mappings of the fields of the types they become."""

    implementation: str | None = None
    k_smooth: bool = True
    block_sizes: Any = None
    variant: Any = None
    qk_dtype: str | None = None


@dataclasses.dataclass
class ParallelConfig:
    """See `ParallelOptions`."""

    plan: str = "auto"
    num_devices: int | None = None
    dp: int | None = None
    weights: str = "replicated"


@dataclasses.dataclass
class GenerateConfig:
    """Keys of the command line. Types are checked by Hydra, values by `GenerateRequest`."""

    prompt: str = ""
    prompts: str | None = None
    negative_prompt: str = ""
    checkpoint: str = "tiny"
    revision: str | None = None
    dtype: str = "float32"
    height: int = 64
    width: int = 96
    num_frames: int = 17
    fps: int = 8
    num_inference_steps: int = 8
    guidance_scale: float = 4.0
    use_dynamic_cfg: bool = False
    scheduler: str = "checkpoint"
    seed: int = 42
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    stages: Any = "text,denoise,vae"
    run_dir: str | None = None
    output_dir: str = "videos"
    name: str | None = None
    resume: bool = True
    checkpoint_every: int | None = None
    preview_every: int = 0
    results_path: str | None = "results/generate.jsonl"
    cache_dir: str | None = None
    compilation_cache: bool = True
    warm_up: bool = False
    profile: bool = False
    profile_run: str | None = None
    logdir: str = "runs"
    verbose: bool = False


def to_request(config: GenerateConfig) -> GenerateRequest:
    """The checked request of a resolved configuration. Raises RequestError."""
    attention = config.attention
    try:
        options = AttentionOptions(
            implementation=attention.implementation,  # type: ignore[arg-type] # checked by AttentionOptions
            k_smooth=attention.k_smooth,
            block_sizes=BlockSizes(**attention.block_sizes) if attention.block_sizes is not None else None,
            variant=Variant(**attention.variant) if attention.variant is not None else None,
            qk_dtype=attention.qk_dtype,  # type: ignore[arg-type] # checked by AttentionOptions
        )
    except RequestError:
        raise
    except (ValueError, TypeError) as error:  # of BlockSizes and Variant: a value, or a field there is not
        raise RequestError(f"attention: {error}") from error
    names = {field.name for field in dataclasses.fields(GenerateRequest)} - {"attention"}
    return GenerateRequest(**{name: getattr(config, name) for name in names}, attention=options)


def request_to_dict(request: GenerateRequest) -> dict[str, Any]:
    """JSON-able."""
    return dataclasses.asdict(request)


def request_from_dict(fields: Mapping[str, Any]) -> GenerateRequest:
    """The inverse of `request_to_dict`."""
    attention = dict(fields["attention"])
    for name, kind in (("block_sizes", BlockSizes), ("variant", Variant)):
        attention[name] = kind(**attention[name]) if attention[name] is not None else None
    return GenerateRequest(**{**fields, "attention": AttentionOptions(**attention)})


def to_parallel(config: GenerateConfig) -> ParallelOptions:
    """The checked parallel options of a resolved configuration. Raises RequestError."""
    return ParallelOptions(**dataclasses.asdict(config.parallel))


def to_options(config: GenerateConfig) -> RunOptions:
    """The checked options of a resolved configuration. Raises RequestError."""
    return RunOptions(config.resume, to_parallel(config), config.checkpoint_every, config.preview_every)
