"""The nodes: their schemas, and calls of `stages`."""

from typing import Any

from comfy_api.latest import io, ui

from . import info, stages
from .host import NodeProgress
from .settings import AUTO, DEFAULT_MODEL, DTYPES, KERNELS, PARALLEL_PLANS, SCHEDULERS, checked_widgets, in_widget_terms

CATEGORY = "CogVideoX TPU"
MAX_SIDE, MAX_FRAMES = 4096, 1001  # pipeline.requests.request's; the tests compare them
MAX_SEED = 2**53 - 1  # the largest that a browser holds exactly

EmbedsIO = io.Custom("COGVIDEOX_EMBEDS")
LatentsIO = io.Custom("COGVIDEOX_LATENTS")


def _model_id() -> Any:
    return io.String.Input(
        "model_id",
        default=DEFAULT_MODEL,
        tooltip="A Hub id (owner/name), a folder under ComfyUI's models folder, or tiny: a small model trained on "
        "drawn shapes, in seconds. Only safetensors are read.",
    )


def _size() -> list[Any]:
    return [
        io.Int.Input("height", default=720, min=16, max=MAX_SIDE, step=16, tooltip="Pixels, a multiple of 16."),
        io.Int.Input("width", default=1280, min=16, max=MAX_SIDE, step=16, tooltip="Pixels, a multiple of 16."),
        io.Int.Input(
            "num_frames",
            default=81,
            min=1,
            max=MAX_FRAMES,
            step=8,
            tooltip="8k + 1: 41, 49, 57, 65, 73, 81, 89, 97 ... 81 is about 5 s at 16 fps.",
        ),
        io.Int.Input("num_inference_steps", default=50, min=1, max=1000, tooltip="Denoising steps."),
        io.Float.Input(
            "guidance_scale",
            default=6.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How closely to follow the prompt. 1 or less: no guidance, the negative prompt is not used, and a "
            "step is about twice as fast.",
        ),
    ]


def _num_devices(minimum: int, tooltip: str) -> Any:
    return io.Int.Input("num_devices", default=8, min=minimum, max=4096, tooltip=tooltip)


def _parallel_plan() -> Any:
    return io.Combo.Input(
        "parallel_plan",
        options=list(PARALLEL_PLANS),
        default=AUTO,
        optional=True,
        tooltip="How a step is split over devices. auto: the fastest as predicted. ulysses: by sequence, traded for "
        "heads around attention; with weights sharded it needs less memory. megatron: by heads and columns. "
        "seed_tp: the published weight table.",
    )


def _kernel() -> Any:
    return io.Combo.Input(
        "kernel",
        options=list(KERNELS),
        default=AUTO,
        optional=True,
        tooltip="Attention. auto: the tuned kernel on a TPU, plain XLA elsewhere. fixed_bound, online: that softmax of "
        "the kernel. int8: faster, not exact. interpret: the kernel, slowly, on any machine. xla: no kernel.",
    )


class CogVideoXTextEncoder(io.ComfyNode):
    """Prompts -> T5 embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTextEncoder",
            display_name="CogVideoX Text Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the prompts with the checkpoint's T5.",
            inputs=[
                io.String.Input("prompt", multiline=True, default="", tooltip="What the video shows."),
                io.String.Input(
                    "negative_prompt", multiline=True, default="", tooltip="What it should not show; may be empty."
                ),
                _model_id(),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=AUTO,
                    optional=True,
                    tooltip="Of weights and activations in all three stages. auto: bfloat16; float32 for tiny.",
                ),
            ],
            outputs=[EmbedsIO.Output(display_name="embeddings", tooltip="Both prompts, encoded.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        values = checked_widgets(cls.define_schema(), values)
        return io.NodeOutput(stages.encode(**values, progress=NodeProgress(cls.hidden.unique_id)))


class CogVideoXTPUSampler(io.ComfyNode):
    """Embeddings -> latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTPUSampler",
            display_name="CogVideoX TPU Sampler",
            category=CATEGORY,
            description="Denoises a video's latents on TPU. The first run of a size compiles it.",
            inputs=[
                # Lazy: ComfyUI then asks check_lazy_status, which checks the other values, before it encodes any text.
                EmbedsIO.Input("embeddings", lazy=True, tooltip="From the CogVideoX Text Encoder."),
                *_size(),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed and values make the same video.",
                ),
                _num_devices(
                    0,
                    "TPU devices to use; 0 for all there are. With guidance and an even number, half of them work on "
                    "each prompt; that half must divide the model's attention heads.",
                ),
                _parallel_plan(),
                _kernel(),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="checkpoint",
                    optional=True,
                    tooltip="checkpoint: the one it was published with.",
                ),
            ],
            outputs=[LatentsIO.Output(display_name="latents", tooltip="For the CogVideoX TPU VAE Decoder.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @in_widget_terms
    def check_lazy_status(cls, embeddings: Any = None, **values: Any) -> list[str]:
        """Ask for the embeddings once all other values are known to be good."""
        stages.sampling_request(embeddings, **checked_widgets(cls.define_schema(), values))
        return ["embeddings"] if embeddings is None else []

    @classmethod
    @in_widget_terms
    def execute(cls, embeddings: Any, **values: Any) -> io.NodeOutput:
        request, parallel = stages.sampling_request(embeddings, **checked_widgets(cls.define_schema(), values))
        progress = NodeProgress(cls.hidden.unique_id, embeddings.checkpoint)
        return io.NodeOutput(stages.denoise(embeddings, request, parallel, progress))


class CogVideoXTPUVAEDecoder(io.ComfyNode):
    """Latents -> frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTPUVAEDecoder",
            display_name="CogVideoX TPU VAE Decoder",
            category=CATEGORY,
            description="Decodes latents to frames.",
            inputs=[
                LatentsIO.Input("latents", tooltip="From the CogVideoX TPU Sampler."),
                io.Int.Input("fps", default=16, min=1, max=120, tooltip="Frames a second, for Create Video."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames."),
                io.Float.Output(display_name="frame_rate", tooltip="fps, as Create Video takes it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @in_widget_terms
    def execute(cls, latents: Any, **values: Any) -> io.NodeOutput:
        fps = checked_widgets(cls.define_schema(), values)["fps"]
        return io.NodeOutput(stages.decode(latents, NodeProgress(cls.hidden.unique_id)), float(fps))


class CogVideoXTPUInfo(io.ComfyNode):
    """What a size costs, before it is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTPUInfo",
            display_name="CogVideoX TPU Info",
            category=CATEGORY,
            description="Shows how attention would run at a size, the tuned entry behind it, and the predicted time. "
            "Needs no TPU and runs nothing.",
            inputs=[
                _model_id(),
                *_size(),
                _num_devices(1, "TPU devices to tell about; they need not be here."),
                io.Combo.Input(
                    "device",
                    options=list(info.DEVICE_KINDS),
                    default=info.DEVICE_KINDS[0],
                    tooltip="The TPU to tell about; it need not be here.",
                ),
                io.Boolean.Input(
                    "predict",
                    default=False,
                    tooltip="Also compile the denoising step for that TPU and predict its time and memory. No TPU is "
                    "needed, but libtpu, and minutes for the full model, in which Cancel waits.",
                ),
                _parallel_plan(),
                _kernel(),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The same text.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, device: str, **values: Any) -> str:
        """A report is shown again from ComfyUI's cache until the device is tuned anew."""
        return info.tuned_version(device)

    @classmethod
    @in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        values = checked_widgets(cls.define_schema(), values)
        report = info.report(**values, say=NodeProgress(cls.hidden.unique_id).say)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [
    CogVideoXTextEncoder,
    CogVideoXTPUSampler,
    CogVideoXTPUVAEDecoder,
    CogVideoXTPUInfo,
]
