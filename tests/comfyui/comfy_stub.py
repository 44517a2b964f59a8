"""Just enough of ComfyUI's modules to load the pack and run its nodes without ComfyUI.

Schemas accept exactly the keywords that ComfyUI 0.3.64 accepts, the oldest version that the pack claims: a newer
keyword, which would make that version refuse the whole pack, is a TypeError here too.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any

COMFYUI_VERSION = "0.3.64"
_INPUT = {"display_name", "optional", "tooltip", "lazy"}
_WIDGET = _INPUT | {"default", "socketless", "force_input"}
_RANGE = {"min", "max", "step", "display_mode"}
_KEYWORDS = {
    "INT": _WIDGET | _RANGE | {"control_after_generate"},
    "FLOAT": _WIDGET | _RANGE | {"round"},
    "STRING": _WIDGET | {"multiline", "placeholder", "dynamic_prompts"},
    "BOOLEAN": _WIDGET | {"label_on", "label_off"},
    "COMBO": (_WIDGET | {"options", "control_after_generate", "upload", "image_folder", "remote"}) - {"force_input"},
}
_SCHEMA = {
    *("node_id", "display_name", "category", "inputs", "outputs", "hidden", "description", "is_input_list"),
    *("is_output_node", "is_deprecated", "is_experimental", "is_api_node", "not_idempotent", "enable_expand"),
}


def _check(what: str, given: dict[str, Any], allowed: set[str]) -> None:
    if unknown := sorted(set(given) - allowed):
        raise TypeError(f"{what}: unexpected keywords {unknown}; ComfyUI {COMFYUI_VERSION} has {sorted(allowed)}")


class Slot:
    """An input or output: its type, its id, and the keywords it was given."""

    def __init__(self, io_type: str, allowed: set[str], slot_id: str | None, keywords: dict[str, Any]):
        _check(f"{io_type} {slot_id}", keywords, allowed)
        self.io_type, self.id, self.keywords = io_type, slot_id, keywords

    def __getattr__(self, name: str) -> Any:
        """Return a keyword, None where it was not given, as ComfyUI's inputs have it."""
        if name in _KEYWORDS.get(self.io_type, _INPUT):
            return self.keywords.get(name)
        raise AttributeError(name)

    def get_io_type(self) -> str:
        return self.io_type

    @property
    def is_widget(self) -> bool:
        return self.io_type in _KEYWORDS

    def get(self, name: str) -> Any:
        return self.keywords.get(name)


def _type(io_type: str) -> Any:
    def make_input(id: str, **keywords: Any) -> Slot:
        return Slot(io_type, _KEYWORDS.get(io_type, _INPUT), id, keywords)

    def make_output(id: str | None = None, **keywords: Any) -> Slot:
        return Slot(io_type, {"display_name", "tooltip", "is_output_list"}, id, keywords)

    return types.SimpleNamespace(io_type=io_type, Input=make_input, Output=make_output)


class Schema:
    def __init__(self, **fields: Any):
        _check("Schema", fields, _SCHEMA)
        self.node_id, self.display_name = fields["node_id"], fields["display_name"]
        self.description = fields.get("description", "")
        self.inputs: list[Slot] = fields.get("inputs", [])
        self.outputs: list[Slot] = fields.get("outputs", [])
        self.hidden: list[str] = fields.get("hidden", [])
        self.is_output_node: bool = fields.get("is_output_node", False)


class ComfyNode:
    hidden = types.SimpleNamespace(unique_id="7")


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None):
        self.args, self.ui = args, ui


class ComfyExtension:
    pass


class InterruptProcessingException(Exception):  # noqa: N818 (ComfyUI's name)
    """As in ComfyUI 0.3.64; a BaseException in later versions."""


class ModelPatcher:
    def __init__(self, model: Any, load_device: Any, offload_device: Any):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device

    def detach(self, unpatch_all: bool = True) -> Any:
        return self.model


class Comfy:
    """What the fake ComfyUI was told and does: the tests' handle on it."""

    def __init__(self, models_dir: Path):
        self.models_dir = models_dir
        self.output_dir, self.input_dir = (Path(f"{models_dir}_{kind}") for kind in ("output", "input"))
        self.interrupt_after: str | None = None  # set the flag once a progress text begins with this
        self.interrupted = False
        self.texts: list[tuple[str, str]] = []
        self.bars: list[tuple[int, int]] = []
        self.previews: list[Any] = []
        self.loaded: list[Any] = []

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.texts.append((text, node_id))
        if self.interrupt_after is not None and text.startswith(self.interrupt_after):
            self.interrupted = True

    def throw_if_interrupted(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException

    def unload_all_models(self) -> None:
        """What "unload models" and /free do."""
        for entry in self.loaded:
            entry.model.detach(True)
        self.loaded.clear()

    def load_models_gpu(self, patchers: list[Any]) -> None:
        self.loaded.extend(types.SimpleNamespace(model=patcher) for patcher in patchers)


def install(models_dir: Path) -> Comfy:
    """Put the modules into sys.modules. Returns the handle."""
    comfy = Comfy(models_dir)

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None):
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            comfy.bars.append((value, total or self.total))
            if preview is not None:
                comfy.previews.append(preview)

    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
        return made

    io = types.SimpleNamespace(
        Schema=Schema,
        ComfyNode=ComfyNode,
        NodeOutput=NodeOutput,
        Custom=_type,
        Hidden=types.SimpleNamespace(unique_id="UNIQUE_ID"),
        **{name: _type(name.upper()) for name in ("Int", "Float", "String", "Boolean", "Combo", "Image", "Latent")},
    )
    ui = types.SimpleNamespace(PreviewText=lambda value: {"text": (value,)})
    import torch

    module("comfy_api")
    module("comfy_api.latest", io=io, ui=ui, ComfyExtension=ComfyExtension)
    module("comfy")
    module(
        "comfy.model_management",
        throw_exception_if_processing_interrupted=comfy.throw_if_interrupted,
        get_torch_device=lambda: torch.device("cpu"),
        load_models_gpu=comfy.load_models_gpu,
        current_loaded_models=comfy.loaded,
    )
    module("comfy.model_patcher", ModelPatcher=ModelPatcher)
    module("comfy.utils", ProgressBar=ProgressBar)
    previews = types.SimpleNamespace(NoPreviews="none", Auto="auto")
    module("comfy.cli_args", args=types.SimpleNamespace(preview_method="auto"), LatentPreviewMethod=previews)
    folders = {"diffusers": [str(models_dir / "diffusers")]}
    loras = models_dir / "loras"

    def get_save_image_path(prefix: str, folder: str) -> tuple[str, str, int, str, str]:
        """As ComfyUI's: a number that no file of the prefix has, and nothing outside the folder."""
        full = Path(os.path.abspath(Path(folder, os.path.dirname(prefix))))
        if not full.is_relative_to(folder):
            raise Exception("Saving image outside the output folder is not allowed.")
        full.mkdir(parents=True, exist_ok=True)
        stem = os.path.basename(prefix)
        counter = len(list(full.glob(f"{stem}_*"))) + 1
        return str(full), stem, counter, os.path.dirname(prefix), prefix

    module(
        "folder_paths",
        models_dir=str(models_dir),
        get_output_directory=lambda: str(comfy.output_dir),
        get_input_directory=lambda: str(comfy.input_dir),
        get_save_image_path=get_save_image_path,
        get_folder_paths=folders.__getitem__,
        get_filename_list=lambda kind: sorted(path.name for path in loras.glob("*")),
        get_full_path=lambda kind, name: str(loras / name) if (loras / name).is_file() else None,
    )
    module("server", PromptServer=types.SimpleNamespace(instance=comfy))
    return comfy
