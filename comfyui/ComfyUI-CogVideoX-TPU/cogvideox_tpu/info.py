"""What the info node shows: the attention call of a size, the tuned entry for it, and what it costs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from . import settings

#: v6e, v5e, v5p, v7x: those of offline_tpu.machine.devices; the tests compare them.
DEVICE_KINDS = ("TPU v6 lite", "TPU v5 lite", "TPU v5", "TPU7x")
_TIMEOUT_S = 1200.0


def report(
    *,
    model_id: str,
    device: str,
    num_devices: int,
    parallel_plan: str,
    kernel: str,
    predict: bool,
    say: Callable[[str], None],
    **fields: Any,
) -> str:
    """Return text of some lines. Raises what the sampler would for the same values, but for devices that are not here.

    predict: compile the step for that device, in a process of its own. say: told when that begins. fields: more of a
    GenerateRequest.
    """
    import torch

    from pipeline.checkpoints.checks import check_request, part_configs
    from pipeline.checkpoints.loading import build_module
    from pipeline.model.latents import LatentGeometry
    from pipeline.model.sharding import resolve_plan
    from pipeline.model.transformer import TransformerShape
    from pipeline.requests.request import GenerateRequest
    from splash_attn import tuned
    from splash_attn.types import AttentionShape

    attention, parallel = settings.attention_options(kernel), settings.parallel_options(parallel_plan, num_devices)
    dtype = settings.resolve_dtype(settings.AUTO, model_id)
    request = GenerateRequest("any", model_id, **fields, dtype=dtype, attention=attention)  # type: ignore[arg-type]
    configs, _ = part_configs(model_id.strip(), lambda: settings.find_checkpoint(model_id))
    if TransformerShape.from_config(configs["transformer"]).takes_image:
        request = dataclasses.replace(request, image="any")
    check_request(request, configs)
    # With diffusers' defaults for what a configuration leaves out.
    module: Any = build_module("transformer", configs["transformer"], torch.float32)
    transformer = module.config
    sizes = TransformerShape.from_config(transformer)
    plan = resolve_plan(parallel, num_devices, request.do_classifier_free_guidance, sizes.num_heads)
    patches = LatentGeometry.from_request(request, transformer, configs["vae"]).num_patches
    seq_len = transformer["max_text_seq_length"] + patches
    heads_a_device = plan.local_heads(sizes.num_heads)
    queries = -(-seq_len // plan.kv)
    shape = AttentionShape(len(request.prompts) // plan.dp, heads_a_device, queries, seq_len, sizes.head_dim)
    lines = [
        f"{model_id}: {request.width}x{request.height}, {request.num_frames} frames, "
        f"{request.num_inference_steps} steps, {dtype}",
        f"{plan} on {plan.num_devices} x {device}",
        f"attention on each device: {shape} (batch x heads x sequence x head_dim)",
    ]
    if attention.implementation == "xla":
        return "\n".join([*lines, "kernel=xla: plain XLA, for which nothing is tuned and no time is known"])
    qk_dtype = attention.qk_dtype or "bfloat16"
    choice = tuned.choose(device, shape, dtype, variant=attention.variant, qk_dtype=qk_dtype)
    lines += [f"blocks {choice.block_sizes}, variant {choice.variant}", choice.reason]
    lines += _attention_times(choice, shape, sizes.num_layers, request.num_inference_steps)
    if predict:
        parallel = dataclasses.replace(parallel, plan=plan.plan)  # the one that would run, not the best of several
        lines += _predicted_step(request, configs, parallel, device, num_devices, say)
    return "\n".join(lines)


def tuned_version(device: str) -> str:
    """Return what changes with the tuned entries of a device."""
    settings.require_packages()
    from splash_attn import tuned

    return repr(tuned.load(device))


def _attention_times(choice: Any, shape: Any, num_layers: int, num_inference_steps: int) -> list[str]:
    """Return the entry's time, and what it comes to for the whole video."""
    if choice.entry is None:
        return ["no tuned entry, hence no time of attention; to tune one: python -m tuning.sweep"]
    provenance = choice.entry.provenance
    label, call_ms = provenance.label, provenance.time_ms
    if choice.entry.shape != shape:
        call_ms *= shape.flops / choice.entry.shape.flops
        label = f"scaled by FLOPs from {label}"
    total_s = call_ms * num_layers * num_inference_steps / 1000
    return [
        f"attention call: {call_ms:.3f} ms ({label}, record {provenance.record_id})",
        f"attention of the whole video: {total_s:.1f} s ({num_layers} layers x {num_inference_steps} steps)",
    ]


def _predicted_step(
    request: Any,
    configs: Mapping[str, Any],
    parallel: Any,
    device: str,
    num_devices: int,
    say: Callable[[str], None],
) -> list[str]:
    from offline_tpu.machine.devices import by_name
    from pipeline.predict.planner import Predictor
    from pipeline.requests.errors import PipelineError, RequestError
    from splash_workbench.workers.cache import JobCache

    topology = f"{by_name(device).name}-{num_devices}"
    predictor = Predictor(topology, request, configs, _TIMEOUT_S, say, cache=JobCache.of_user(True))
    try:
        prediction = predictor.predict(("denoise",), parallel)
    except RequestError:
        raise
    except PipelineError as error:  # what is known without it is worth showing
        return [f"no prediction: {str(error).splitlines()[0]}"]
    denoise = prediction.stages["denoise"]
    total_s = denoise["time_s"] * request.num_inference_steps
    return [
        f"denoising on {topology}: {denoise['time_s']:.3g} s a step, {total_s:.3g} s in all, without text encoder and "
        "VAE (predicted from the compiler's schedule; nothing was run)",
        f"memory at its peak: {denoise['peak_hbm_bytes'] / 2**30:.2f} of {denoise['hbm_bytes'] / 2**30:.0f} GiB a "
        "device (predicted)",
    ]
