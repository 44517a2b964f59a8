"""The nodes: their schemas, and calls of `stages`."""

import dataclasses
from typing import Any

from comfy_api.latest import io

from . import exchange_nodes, host, info, settings, stages
from .host import NodeProgress
from .schema import MODEL_ID, EmbedsIO, LatentsIO, combo, node_schema

MAX_SEED = 2**53 - 1  # the largest that a browser holds exactly
_LIMITS = settings.limits()


def _num_devices(minimum: int) -> tuple[Any, str, dict[str, Any]]:
    return io.Int, "num_devices", {"default": 8, "min": minimum, "max": 4096}


_SIDE = {"min": 16, "max": _LIMITS["MAX_SIDE"], "step": _LIMITS["SIZE_MULTIPLE"]}
_FRAMES = {"min": 1, "max": _LIMITS["MAX_FRAMES"], "step": _LIMITS["FRAME_MULTIPLE"]}
_SIZE = [
    (io.Int, "height", {"default": 720, **_SIDE}),
    (io.Int, "width", {"default": 1280, **_SIDE}),
    (io.Int, "num_frames", {"default": 81, **_FRAMES}),
    (io.Int, "num_inference_steps", {"default": 50, "min": 1, "max": _LIMITS["MAX_STEPS"]}),
    (io.Float, "guidance_scale", {"default": 6.0, "min": 0.0, "max": _LIMITS["MAX_GUIDANCE"], "step": 0.1}),
]
_PLAN_AND_KERNEL = [
    combo("parallel_plan", settings.PARALLEL_PLANS, optional=True),
    combo("kernel", settings.KERNELS, optional=True),
]


class CogVideoXTextEncoder(io.ComfyNode):
    """Prompts -> T5 embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            (io.String, "prompt", {"multiline": True, "default": ""}),
            (io.String, "negative_prompt", {"multiline": True, "default": ""}),
            MODEL_ID,
            combo("dtype", settings.DTYPES, optional=True),
        ]
        return node_schema("CogVideoXTextEncoder", inputs, [EmbedsIO])

    @classmethod
    @settings.checked_widgets
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(stages.encode(**values, progress=NodeProgress(cls.hidden.unique_id)))


class CogVideoXTPUModel(io.ComfyNode):
    """A model's id, from a list."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema("CogVideoXTPUModel", [combo("model", settings.model_ids())], [io.String])

    @classmethod
    @settings.checked_widgets
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(model)


class CogVideoXTPUImage(io.ComfyNode):
    """The first frame, for an image-to-video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        noise = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001, "optional": True}
        inputs = [(EmbedsIO, "embeddings", {}), (io.Image, "image", {}), (io.Float, "noise_aug_strength", noise)]
        return node_schema("CogVideoXTPUImage", inputs, [EmbedsIO])

    @classmethod
    @settings.checked_widgets
    def execute(cls, embeddings: Any, image: Any, **values: Any) -> io.NodeOutput:
        stages.check_frames(image, one=True)
        return io.NodeOutput(dataclasses.replace(embeddings, image=image, **values))


class CogVideoXTPUVideo(io.ComfyNode):
    """Frames that are made anew, by a text-to-video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 0.8, "min": 0.0, "max": 1.0, "step": 0.01}
        inputs = [(EmbedsIO, "embeddings", {}), (io.Image, "images", {}), (io.Float, "strength", strength)]
        return node_schema("CogVideoXTPUVideo", inputs, [EmbedsIO])

    @classmethod
    @settings.checked_widgets
    def execute(cls, embeddings: Any, images: Any, **values: Any) -> io.NodeOutput:
        stages.check_frames(images, one=False)
        return io.NodeOutput(dataclasses.replace(embeddings, video=images, **values))


class CogVideoXTPULora(io.ComfyNode):
    """A LoRA; several, one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        limit = float(_LIMITS["MAX_STRENGTH"] or 0)
        inputs = [
            (EmbedsIO, "embeddings", {}),
            combo("lora_name", [*host.lora_files(), *settings.TINY_LORAS]),
            (io.Float, "strength", {"default": min(1.0, limit), "min": -limit, "max": limit, "step": 0.01}),
        ]
        return node_schema("CogVideoXTPULora", inputs, [EmbedsIO])

    @classmethod
    @settings.checked_widgets
    def execute(cls, embeddings: Any, lora_name: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(stages.with_lora(embeddings, lora_name, strength))


class CogVideoXTPUSampler(io.ComfyNode):
    """Embeddings -> latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            # Lazy: ComfyUI then asks check_lazy_status, which checks the other values, before it encodes any text.
            (EmbedsIO, "embeddings", {"lazy": True}),
            *_SIZE,
            (io.Int, "seed", {"default": 42, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            _num_devices(0),
            *_PLAN_AND_KERNEL,
            combo("scheduler", settings.SCHEDULERS, optional=True),
            (io.Boolean, "use_dynamic_cfg", {"default": False, "optional": True}),
            combo("quality", settings.QUALITIES, optional=True),
            combo("cache", settings.CACHES, optional=True),
        ]
        return node_schema("CogVideoXTPUSampler", inputs, [LatentsIO])

    @classmethod
    @settings.checked_widgets
    def check_lazy_status(cls, embeddings: Any = None, **values: Any) -> list[str]:
        """Ask for the embeddings once all other values are known to be good."""
        stages.sampling_request(embeddings, **values)
        return ["embeddings"] if embeddings is None else []

    @classmethod
    @settings.checked_widgets
    def execute(cls, embeddings: Any, **values: Any) -> io.NodeOutput:
        from pipeline.checkpoints.checks import size_warning

        request, parallel = stages.sampling_request(embeddings, **values)
        progress = NodeProgress(cls.hidden.unique_id, embeddings.checkpoint)
        latents = stages.denoise(embeddings, request, parallel, progress)
        if warning := size_warning(request):
            progress.say(warning)  # last, so that it stays there
        return io.NodeOutput(latents)


class CogVideoXTPUVAEDecoder(io.ComfyNode):
    """Latents -> frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fps = {"default": 16.0, "min": 1.0, "max": _LIMITS["MAX_FPS"], "step": 0.001}
        inputs = [(LatentsIO, "latents", {}), (io.Float, "fps", fps)]
        return node_schema("CogVideoXTPUVAEDecoder", inputs, [io.Image, io.Float])

    @classmethod
    @settings.checked_widgets
    def execute(cls, latents: Any, fps: float) -> io.NodeOutput:
        return io.NodeOutput(stages.decode(latents, NodeProgress(cls.hidden.unique_id)), float(fps))


class CogVideoXTPUInfo(io.ComfyNode):
    """What a size costs, before it is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            MODEL_ID,
            *_SIZE,
            _num_devices(1),
            combo("device", info.DEVICE_KINDS),
            (io.Boolean, "predict", {"default": False}),
            *_PLAN_AND_KERNEL,
        ]
        return node_schema("CogVideoXTPUInfo", inputs, [io.String], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, device: str, **values: Any) -> str:
        """A report is shown again from ComfyUI's cache until the device is tuned anew."""
        return info.tuned_version(device)

    @classmethod
    @settings.checked_widgets
    def execute(cls, **values: Any) -> io.NodeOutput:
        report = info.report(**values, say=NodeProgress(cls.hidden.unique_id).say)
        return io.NodeOutput(report, ui=host.show(cls.hidden.unique_id, report))


NODES: list[type[io.ComfyNode]] = [
    CogVideoXTextEncoder,
    CogVideoXTPUSampler,
    CogVideoXTPUVAEDecoder,
    CogVideoXTPUInfo,
    CogVideoXTPUModel,
    CogVideoXTPUImage,
    CogVideoXTPUVideo,
    CogVideoXTPULora,
    *exchange_nodes.NODES,
]
