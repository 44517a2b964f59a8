"""The programs of the stages with the shapes of a request, for devices that are here or not: no weight is read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.checkpoints.checks import part_configs
from pipeline.checkpoints.loading import build_module, resolve_checkpoint
from pipeline.model.denoise_step import EVERYTHING, NOTHING, DenoiseStep, Reuse, StepWork
from pipeline.model.latents import LatentGeometry, TokenLayout
from pipeline.model.noise_schedule import build_scheduler, step_table
from pipeline.model.placement import split_mesh
from pipeline.model.sharding import ParallelPlan, resolve_plan
from pipeline.model.transformer import TransformerShape
from pipeline.model.vae.decoder import DecoderShape
from pipeline.model.vae.layers import DECODER_PREFIXES, ENCODER_PREFIXES, arrange
from pipeline.model.weights import abstract_weights
from pipeline.requests.config import GenerateConfig
from pipeline.requests.models import MODELS
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest, Stage, to_request
from pipeline.stages.text import encode_program, weight_sharding
from pipeline.stages.vae import (
    cache_like,
    decode_program,
    decoder_sharding,
    encode_frames_program,
    frame_batches,
    frame_sharding,
    latent_sharding,
)
from splash_workbench.compile_cache import use_compilation_cache
from splash_workbench.program import Program

Configs = Mapping[str, Mapping[str, Any]]
#: Deviation of random weights and activations with which every stage's results are finite.
_SCALE = 0.02
#: Chips with less take the 11 GB of the transformer's weights only in parts.
_ROOMY_BYTES = 24 * 2**30


def build_step(
    module: Any,
    geometry: LatentGeometry,
    text_seq_len: int,
    plan: ParallelPlan,
    devices: Sequence[jax.Device],
    *,
    attention: AttentionOptions,
    guided: bool,
    noisy: bool,
    reuse: Reuse = NOTHING,
) -> DenoiseStep:
    """Return the step for a stock transformer (on the meta device will do), sizes of a request, and a plan.

    Raises CheckpointError when the transformer is not of CogVideoX's kind.
    """
    shape = TransformerShape.from_config(module.config)
    stock = plan.uses_stock_block
    layout = TokenLayout(text_seq_len, geometry.num_patches, plan.sequence_shards, padded=not stock)
    stock_block = module.transformer_blocks[0] if stock else None
    return DenoiseStep(shape, layout, plan, plan.mesh(devices), attention, guided, noisy, stock_block, reuse)


def denoise_program(
    request: GenerateRequest,
    configs: Configs,
    plan: ParallelPlan,
    devices: Sequence[jax.Device],
    reuse: Reuse = NOTHING,
    work: StepWork = EVERYTHING,
    compiler_options: Mapping[str, str] | None = None,
) -> tuple[Program, DenoiseStep]:
    """Return one denoising step, and what it was made from.

    configs: of the checkpoint's parts. compiler_options: see `DenoiseStep`.
    """
    config = configs["transformer"]
    dtype = jnp.dtype(request.dtype)
    module: Any = build_module("transformer", config, getattr(torch, request.dtype))
    geometry = LatentGeometry.from_request(request, module.config, configs["vae"])
    scheduler = build_scheduler(configs["scheduler"], request.scheduler)
    step = build_step(
        module,
        geometry,
        module.config["max_text_seq_length"],
        plan,
        devices,
        attention=request.attention,
        guided=request.do_classifier_free_guidance,
        noisy=step_table(scheduler, request.num_inference_steps).needs_noise,
        reuse=reuse,
    )
    step = dataclasses.replace(step, work=work, compiler_options=compiler_options)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    weights = abstract_weights(shapes, dtype, plan, step.mesh, request.int8_linears)
    arguments = (weights, *abstract_arguments(step, module.config, dtype))
    return Program(step.jitted(weights), arguments, step.mesh, carried={1: 0, 2: 1, 10: 3}, scale=_SCALE), step


def abstract_arguments(step: DenoiseStep, config: Mapping[str, Any], dtype: Any) -> tuple[Any, ...]:
    """Return the arguments of the step's program after the weights, as ShapeDtypeStructs with shardings.

    config: of the transformer. dtype: of weights, embeddings and latents.
    """

    def array(name: str, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=step.sharding(name))

    layout, channels = step.layout, step.shape.patch_channels
    half, prompts = step.shape.head_dim // 2, 2 if step.guided and step.work.negative else 1
    table = (layout.video, 2 * half) if step.plan.uses_stock_block else (half, layout.rows)
    rotary = array("rotary", jnp.float32, *table)
    conditions = {
        name: array("condition", dtype, layout.rows, channels)
        for name, channels in step.shape.condition_channels.items()
    }
    return (
        array("sample", dtype, layout.rows, channels),
        array("x0", jnp.float32, layout.rows, channels),
        array("noise", dtype, layout.rows, channels) if step.noisy else array("noise", jnp.float32),
        array("embeddings", dtype, prompts, layout.text, config["text_embed_dim"]),
        (rotary, rotary) if step.shape.rotary else None,
        array("scalar", jnp.int32),
        array("scalar", jnp.float32),
        array("scalar", jnp.float32, 6),
        conditions,
        step.kept_arrays(dtype),
    )


def text_program(request: GenerateRequest, configs: Configs, devices: Sequence[jax.Device]) -> Program:
    """Return the encoding of a request's prompts."""
    module = build_module("text_encoder", configs["text_encoder"], getattr(torch, request.dtype))
    everywhere = NamedSharding(split_mesh(devices, 1), PartitionSpec())
    weights = {
        name: jax.ShapeDtypeStruct(
            value.shape, jnp.dtype(request.dtype), sharding=weight_sharding(value.shape, devices)
        )
        for name, value in module.named_parameters()
    }
    num_prompts = 2 if request.do_classifier_free_guidance else 1
    text_seq_len = configs["transformer"]["max_text_seq_length"]
    token_ids = jax.ShapeDtypeStruct((num_prompts, text_seq_len), jnp.int32, sharding=everywhere)
    mesh = cast(Mesh, everywhere.mesh)
    return Program(encode_program(module, everywhere), (weights, token_ids), mesh, scale=_SCALE)


def vae_programs(
    request: GenerateRequest, configs: Configs, devices: Sequence[jax.Device]
) -> list[tuple[Program, int]]:
    """Return the decoding of the first batch of latent frames, and of any other where there are, and how often each.

    Before them the encoding, likewise, where the request has an image or a video.
    """
    config = configs["vae"]
    dtype = jnp.dtype(request.dtype)
    module: Any = build_module("vae", config, getattr(torch, request.dtype))
    shape, geometry = (
        DecoderShape.from_config(config),
        LatentGeometry.from_request(request, configs["transformer"], config),
    )
    channels, height, width = geometry.shape[2:]
    batches = list(frame_batches(geometry.num_frames, module.num_latent_frames_batch_size))
    latents = [(1, stop - start, channels, height, width) for start, stop in batches]
    programs = []
    if request.encodes:
        num_frames = 1 if request.image is not None else request.num_frames
        batches = list(frame_batches(num_frames, module.num_sample_frames_batch_size))
        frames = [(stop - start, request.height, request.width, 3) for start, stop in batches]
        split = frame_sharding(latent_sharding(geometry.shape, devices))
        weights = _vae_weights(module, ENCODER_PREFIXES, dtype, devices)
        programs += _batch_programs(encode_frames_program(shape, split), weights, dtype, frames, split)
    weights = _vae_weights(module, DECODER_PREFIXES, dtype, devices)
    sharding = decoder_sharding(weights, jax.ShapeDtypeStruct(geometry.shape, dtype), shape, devices)
    return [*programs, *_batch_programs(decode_program(shape, True, sharding), weights, dtype, latents, sharding)]


def _vae_weights(module: Any, prefixes: tuple[str, ...], dtype: Any, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Return a half's weights, on every device, as a run places them."""
    everywhere = NamedSharding(split_mesh(devices, 1), PartitionSpec())
    return {
        name: jax.ShapeDtypeStruct(
            jax.eval_shape(arrange, jax.ShapeDtypeStruct(value.shape, dtype)).shape, dtype, sharding=everywhere
        )
        for name, value in module.named_parameters()
        if name.startswith(prefixes)
    }


def _batch_programs(
    jitted: Any,
    weights: Mapping[str, Any],
    dtype: Any,
    inputs: Sequence[tuple[int, ...]],
    sharding: NamedSharding,
) -> list[tuple[Program, int]]:
    """Return a half of the VAE on its first batch, and on any other where there are, and how often each runs."""
    mesh = cast(Mesh, sharding.mesh)
    programs, cache = [], None
    for index, shape in enumerate(inputs[:2]):
        batch = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        program = Program(jitted, (weights, batch, cache), mesh, {2: 1} if index else {}, _SCALE)
        programs.append((program, len(inputs) - 1 if index else 1))
        with jax.set_mesh(mesh):
            cache = cache_like(jax.eval_shape(jitted, weights, batch, cache)[1], sharding)
    return programs


@dataclasses.dataclass(frozen=True)
class ModelProgram:
    """One call of a stage of a named model, and in words of JSON what it is a call of."""

    program: Program
    arguments: dict[str, Any]
    config: dict[str, Any]


def model_program(model: str, stage: Stage, devices: Sequence[jax.Device], hbm_bytes: int | None) -> ModelProgram:
    """Return one call of a stage at the size that a named model is made for: a denoising step, one later VAE batch, T5.

    Args:
      model: see `pipeline.requests.models`.
      devices: that it runs on, all of them.
      hbm_bytes: of one of them, None where not known: small ones hold the transformer's weights in parts.
    """
    use_compilation_cache()
    request, configs, plan = model_request(model, len(devices), hbm_bytes)
    make: Mapping[Stage, Callable[[], Program]] = {
        "text": lambda: text_program(request, configs, devices),
        "denoise": lambda: denoise_program(request, configs, plan, devices)[0],
        "vae": lambda: vae_programs(request, configs, devices)[-1][0],
    }
    sizes = {name: getattr(request, name) for name in ("height", "width", "num_frames", "dtype")}
    config = {"num_devices": len(devices)} | (dataclasses.asdict(plan) if stage == "denoise" else {})
    return ModelProgram(make[stage](), {"checkpoint": request.checkpoint, **sizes}, config)


def model_request(model: str, num_devices: int, hbm_bytes: int | None) -> tuple[GenerateRequest, Configs, ParallelPlan]:
    """Return a named model's request, its configurations, and how a step shares so many devices.

    Raises RequestError where so many cannot share it.
    """
    checkpoint = MODELS[model].checkpoint
    request = to_request(GenerateConfig(prompt="any", model=model, checkpoint=checkpoint))
    configs, _ = part_configs(checkpoint, lambda: resolve_checkpoint(checkpoint))
    guided, num_heads = request.do_classifier_free_guidance, configs["transformer"]["num_attention_heads"]
    plan = resolve_plan(ParallelOptions(), num_devices, guided, num_heads)
    frugal = hbm_bytes is not None and hbm_bytes < _ROOMY_BYTES and plan.model > 1
    return request, configs, dataclasses.replace(plan, weights="sharded") if frugal else plan
