"""The nodes: their schemas, and calls of `stages`. What they say to users is in locales/en/nodeDefs.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from . import host, info, settings, stages
from .host import NodeProgress

MAX_SEED = 2**53 - 1  # the largest that a browser holds exactly
_TEXTS = json.loads(Path(__file__).parents[1].joinpath("locales", "en", "nodeDefs.json").read_text(encoding="utf-8"))
_LIMITS = settings.limits()

EmbedsIO = io.Custom("COGVIDEOX_EMBEDS")
LatentsIO = io.Custom("COGVIDEOX_LATENTS")


def _schema(node_id: str, inputs: list[Any], outputs: list[Any], **keywords: Any) -> io.Schema:
    """Return a schema with the node's texts. inputs, outputs: (type, id, keywords) and types."""
    texts = _TEXTS[node_id]
    return io.Schema(
        node_id=node_id,
        display_name=texts["display_name"],
        category="CogVideoX TPU",
        description=texts["description"],
        inputs=[kind.Input(name, tooltip=texts["inputs"][name]["tooltip"], **more) for kind, name, more in inputs],
        outputs=[
            kind.Output(
                display_name=texts["outputs"][str(index)]["name"], tooltip=texts["outputs"][str(index)]["tooltip"]
            )
            for index, kind in enumerate(outputs)
        ],
        hidden=[io.Hidden.unique_id],
        **keywords,
    )


def _combo(name: str, options: Any, **keywords: Any) -> tuple[Any, str, dict[str, Any]]:
    """Describe a choice; its default is the first option."""
    return io.Combo, name, {"options": list(options), "default": next(iter(options)), **keywords}


def _num_devices(minimum: int) -> tuple[Any, str, dict[str, Any]]:
    return io.Int, "num_devices", {"default": 8, "min": minimum, "max": 4096}


_MODEL_ID = (io.String, "model_id", {"default": settings.DEFAULT_MODEL})
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
    _combo("parallel_plan", settings.PARALLEL_PLANS, optional=True),
    _combo("kernel", settings.KERNELS, optional=True),
]


class CogVideoXTextEncoder(io.ComfyNode):
    """Prompts -> T5 embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            (io.String, "prompt", {"multiline": True, "default": ""}),
            (io.String, "negative_prompt", {"multiline": True, "default": ""}),
            _MODEL_ID,
            _combo("dtype", settings.DTYPES, optional=True),
        ]
        return _schema("CogVideoXTextEncoder", inputs, [EmbedsIO])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        return io.NodeOutput(stages.encode(**values, progress=NodeProgress(cls.hidden.unique_id)))


class CogVideoXTPUModel(io.ComfyNode):
    """A model's id, from a list."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema("CogVideoXTPUModel", [_combo("model", settings.model_ids())], [io.String])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(settings.checked_widgets(cls.define_schema(), values)["model"])


class CogVideoXTPUImage(io.ComfyNode):
    """The first frame, for an image-to-video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        noise = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001, "optional": True}
        inputs = [(EmbedsIO, "embeddings", {}), (io.Image, "image", {}), (io.Float, "noise_aug_strength", noise)]
        return _schema("CogVideoXTPUImage", inputs, [EmbedsIO])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, embeddings: Any, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        return io.NodeOutput(dataclasses.replace(embeddings, **values))


class CogVideoXTPUVideo(io.ComfyNode):
    """Frames that are made anew, by a text-to-video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 0.8, "min": 0.0, "max": 1.0, "step": 0.01}
        inputs = [(EmbedsIO, "embeddings", {}), (io.Image, "images", {}), (io.Float, "strength", strength)]
        return _schema("CogVideoXTPUVideo", inputs, [EmbedsIO])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, embeddings: Any, images: Any, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        return io.NodeOutput(dataclasses.replace(embeddings, video=images, **values))


class CogVideoXTPULora(io.ComfyNode):
    """A LoRA; several, one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        limit = float(_LIMITS["MAX_STRENGTH"] or 0)
        inputs = [
            (EmbedsIO, "embeddings", {}),
            _combo("lora_name", host.lora_files() or [settings.NO_LORA]),
            (io.Float, "strength", {"default": min(1.0, limit), "min": -limit, "max": limit, "step": 0.01}),
        ]
        return _schema("CogVideoXTPULora", inputs, [EmbedsIO])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, embeddings: Any, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        return io.NodeOutput(stages.with_lora(embeddings, values["lora_name"], values["strength"]))


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
            _combo("scheduler", settings.SCHEDULERS, optional=True),
            (io.Boolean, "use_dynamic_cfg", {"default": False, "optional": True}),
        ]
        return _schema("CogVideoXTPUSampler", inputs, [LatentsIO])

    @classmethod
    @settings.in_widget_terms
    def check_lazy_status(cls, embeddings: Any = None, **values: Any) -> list[str]:
        """Ask for the embeddings once all other values are known to be good."""
        stages.sampling_request(embeddings, **settings.checked_widgets(cls.define_schema(), values))
        return ["embeddings"] if embeddings is None else []

    @classmethod
    @settings.in_widget_terms
    def execute(cls, embeddings: Any, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        request, parallel = stages.sampling_request(embeddings, **values)
        progress = NodeProgress(cls.hidden.unique_id, embeddings.checkpoint)
        return io.NodeOutput(stages.denoise(embeddings, request, parallel, progress))


class CogVideoXTPUVAEDecoder(io.ComfyNode):
    """Latents -> frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fps = {"default": 16.0, "min": 1.0, "max": _LIMITS["MAX_FPS"], "step": 0.001}
        inputs = [(LatentsIO, "latents", {}), (io.Float, "fps", fps)]
        return _schema("CogVideoXTPUVAEDecoder", inputs, [io.Image, io.Float])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, latents: Any, **values: Any) -> io.NodeOutput:
        fps = settings.checked_widgets(cls.define_schema(), values)["fps"]
        return io.NodeOutput(stages.decode(latents, NodeProgress(cls.hidden.unique_id)), float(fps))


class CogVideoXTPUInfo(io.ComfyNode):
    """What a size costs, before it is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            _MODEL_ID,
            *_SIZE,
            _num_devices(1),
            _combo("device", info.DEVICE_KINDS),
            (io.Boolean, "predict", {"default": False}),
            *_PLAN_AND_KERNEL,
        ]
        return _schema("CogVideoXTPUInfo", inputs, [io.String], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, device: str, **values: Any) -> str:
        """A report is shown again from ComfyUI's cache until the device is tuned anew."""
        return info.tuned_version(device)

    @classmethod
    @settings.in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        report = info.report(**values, say=NodeProgress(cls.hidden.unique_id).say)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [
    CogVideoXTextEncoder,
    CogVideoXTPUSampler,
    CogVideoXTPUVAEDecoder,
    CogVideoXTPUInfo,
    CogVideoXTPUModel,
    CogVideoXTPUImage,
    CogVideoXTPUVideo,
    CogVideoXTPULora,
]
