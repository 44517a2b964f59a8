"""The schema of configs/generate.yaml. Imports no JAX: options are read before it."""

import dataclasses
from typing import Any

from pipeline.requests.models import MODEL_FIELDS, fill_in_defaults
from pipeline.requests.reuse import CacheConfig
from splash_workbench.engines.settings import EngineSchema

#: Keys, or patterns of them, of runs in folders of their own: commands that keep no such run have no use for them.
OF_RUNS = (
    *("run_dir", "output_dir", "name", "resume", "checkpoint_every", "preview_every", "warm_up", "num_videos"),
    *("context_frames", "context_overlap", "distributed.*", "engine*"),
)


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
class DistributedConfig:
    """See `DistributedOptions`."""

    enabled: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_s: float = 1800.0


@dataclasses.dataclass
class GenerateConfig:
    """Keys of the command line. Types are checked by Hydra, values by `GenerateRequest`.

    model: whose defaults hold for what is None, unless the checkpoint is another model's.
    """

    prompt: str | None = None
    prompts: str | None = None
    negative_prompt: str = ""
    model: str = "tiny"
    checkpoint: str = "tiny"
    revision: str | None = None
    dtype: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    use_dynamic_cfg: bool | None = None
    scheduler: str | None = None
    seed: int = 42
    num_videos: int = 1
    image: str | None = None
    noise_aug_strength: float = 0.0
    video: str | None = None
    strength: float = 0.8
    latents: str | None = None
    lora: Any = None
    transformer: str | None = None
    context_frames: int | None = None
    context_overlap: int = 16
    quality: str = "exact"
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    quantization: str | None = None
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    engine: EngineSchema = dataclasses.field(default_factory=EngineSchema)
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
    topology: str | None = None
    profile: bool = False
    profile_run: str | None = None
    logdir: str = "runs"
    verbose: bool = False


def request_field(name: str, *, _root_: Any) -> Any:
    """Return a field of the request that a configuration makes: for --help, where it is ${request:height}."""
    fields = {field: _root_[field] for field in ("checkpoint", *MODEL_FIELDS)}
    return fill_in_defaults(fields, _root_.model)[name]
