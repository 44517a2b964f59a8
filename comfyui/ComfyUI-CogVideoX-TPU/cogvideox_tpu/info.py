"""What the info node shows: the attention call of a size, the tuned entry for it, and its time."""

from typing import Any

from . import settings

DEVICE_KINDS = ("TPU v6 lite", "TPU v5 lite")  # v6e, v5e: splash_attn.device's; the tests compare them


def report(
    model_id: str,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float,
    num_devices: int,
    device: str,
    parallel_plan: str,
    kernel: str,
    scheduler: str,
) -> str:
    """Text of some lines. Raises what the sampler would for the same values, but for devices that are not here."""
    settings.require_packages()
    from pipeline.latents import LatentGeometry
    from pipeline.parallel import resolve_plan
    from pipeline.request import GenerateRequest
    from pipeline.transformer import TransformerShape
    from splash_attn import tuned
    from splash_attn.types import AttentionShape

    request = GenerateRequest(
        prompt="any",
        checkpoint=model_id,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        dtype=settings.resolve_dtype(settings.AUTO, model_id),  # type: ignore[arg-type]
        scheduler=scheduler,  # type: ignore[arg-type]
        attention=settings.attention_options(kernel),
    )
    guided = request.do_classifier_free_guidance
    checkpoint = settings.find_checkpoint(model_id)
    transformer, vae = checkpoint.config("transformer"), checkpoint.config("vae")
    num_heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    plan = resolve_plan(settings.parallel_options(parallel_plan, num_devices), num_devices, guided, num_heads)
    patches = LatentGeometry.of(request, transformer, vae).num_patches(TransformerShape.of(transformer))
    seq_len = transformer.get("max_text_seq_length", 226) + patches
    shape = AttentionShape((2 if guided else 1) // plan.dp, num_heads // plan.model, seq_len, seq_len, head_dim)
    lines = [
        f"{checkpoint.name}: {width}x{height}, {num_frames} frames, {num_inference_steps} steps, {request.dtype}",
        f"{plan} on {plan.num_devices} x {device}",
        f"attention on each device: {shape} (batch x heads x sequence x head_dim)",
    ]
    if request.attention.implementation == "xla":
        return "\n".join([*lines, "kernel=xla: plain XLA, for which nothing is tuned and no time is known"])
    choice = tuned.choose(device, shape, request.dtype, variant=request.attention.variant)
    lines += [f"blocks {choice.block_sizes}, variant {choice.variant}", choice.reason]
    lines += _times(choice, shape, transformer["num_layers"], num_inference_steps)
    return "\n".join(lines)


def _times(choice: Any, shape: Any, num_layers: int, num_inference_steps: int) -> list[str]:
    """The entry's time, and what it comes to for the whole video."""
    if choice.entry is None:
        return ["no tuned entry, hence no time; to tune one: python -m tuning.sweep"]
    provenance = choice.entry.provenance
    label, call_ms = provenance.label, provenance.time_ms
    if choice.entry.shape != shape:
        call_ms *= shape.flops / choice.entry.shape.flops
        label = f"scaled by FLOPs from {label}"
    total_s = call_ms * num_layers * num_inference_steps / 1000
    return [
        f"attention call: {call_ms:.3f} ms ({label}, record {provenance.record_id})",
        f"attention of the whole video: {total_s:.1f} s ({num_layers} layers x {num_inference_steps} steps; without "
        "the other operations, the text encoder and the VAE)",
    ]
