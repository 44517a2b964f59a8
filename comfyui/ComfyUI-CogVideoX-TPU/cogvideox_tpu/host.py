"""What the nodes ask of ComfyUI: model folders, progress, previews, interruption, and the call to free memory."""

import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_api.latest import ui
from server import PromptServer

logger = logging.getLogger(__name__)

_PREVIEW = {"max_frames": 4, "max_side": 768}
_DOING = {"load": "loading weights", "compile": "compiling"}


def model_folders() -> list[Path]:
    """Return where checkpoints may lie: ComfyUI's folders for diffusers models, then its models folder."""
    return [Path(folder) for folder in [*folder_paths.get_folder_paths("diffusers"), folder_paths.models_dir]]


def lora_files() -> dict[str, str]:
    """Return the LoRAs in ComfyUI's folders for them: name -> path."""
    found = {name: folder_paths.get_full_path("loras", name) for name in folder_paths.get_filename_list("loras")}
    return {name: path for name, path in found.items() if path is not None and name.endswith(".safetensors")}


def path_to_save(filename_prefix: str, suffix: str) -> tuple[Path, str]:
    """Return a new file's path under ComfyUI's output folder, and its name there. Raises what ComfyUI raises."""
    root = Path(folder_paths.get_output_directory())
    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, str(root))
    name = f"{stem}_{counter:05}_{suffix}"
    return Path(folder, name), Path(subfolder, name).as_posix()


def saved_files(suffix: str) -> dict[str, Path]:
    """Return files of a kind under ComfyUI's output and input folders: name, as ComfyUI writes them -> path."""
    found = {}
    for kind, root in (("output", folder_paths.get_output_directory()), ("input", folder_paths.get_input_directory())):
        for path in sorted(Path(root).rglob(f"*{suffix}")):
            found[f"{path.relative_to(root).as_posix()} [{kind}]"] = path
    return found


def file_version(name: str, suffix: str) -> str:
    """Return what changes with the content of one of `saved_files`; "" where it is not there."""
    path = saved_files(suffix).get(name)
    return f"{path.stat().st_mtime_ns} {path.stat().st_size}" if path else ""


class NodeProgress:
    """A `pipeline.stages.progress.Progress` that shows on a node what it is doing, and stops it when the user asks.

    Shown are a bar, seconds a step with the time left, and a picture of every denoising step where ComfyUI has
    previews turned on. checkpoint: of the latents, a pipeline.checkpoints.loading.Checkpoint.
    """

    def __init__(self, node_id: str, checkpoint: Any = None):
        self._node_id = node_id
        self._checkpoint = checkpoint
        self._previews: Any = None
        self._bar: Any = None
        self._step_times_s: list[float] = []

    def __call__(self, event: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if event.phase != "run":
            self.say(f"{event.stage}: {_DOING[event.phase]} ...")
        elif event.step == 0:
            self._bar = comfy.utils.ProgressBar(event.total_steps, node_id=self._node_id)
            self._step_times_s = []
        else:
            self._step_times_s.append(event.step_time_s)
            self.say(step_text(event.step, event.total_steps, self._step_times_s))
            self._bar.update_absolute(event.step, event.total_steps, self._preview(event))

    def say(self, text: str) -> None:
        """Show a text on the node."""
        logger.info(text)
        PromptServer.instance.send_progress_text(text, self._node_id)

    def _preview(self, event: Any) -> tuple[str, Any, int] | None:
        if event.preview is None or args.preview_method == LatentPreviewMethod.NoPreviews:
            return None
        from pipeline.runs.preview import Previews

        self._previews = self._previews or Previews(self._checkpoint)
        picture = self._previews.sheet(event.preview(), **_PREVIEW)
        return ("JPEG", picture, _PREVIEW["max_side"]) if picture else None


def show(node_id: str, text: str) -> Any:
    """Show a text on a node. Returns it for the run's history, which frontends draw on Preview Any alone."""
    NodeProgress(node_id).say(text)
    return ui.PreviewText(text)


def step_text(step: int, total_steps: int, step_times_s: list[float]) -> str:
    """Tell how far a stage is, seconds a step (median), and the time left."""
    step_time_s = statistics.median(step_times_s)
    left_s = round(step_time_s * (total_steps - step))
    left = f"{left_s} s" if left_s < 60 else f"{left_s // 60} min {left_s % 60} s"
    return f"{step}/{total_steps}, {step_time_s:.2f} s a step, {left} left"


class CogVideoXStages(torch.nn.Module):
    """Without parameters: a name for ComfyUI's log."""


class _Unloadable(comfy.model_patcher.ModelPatcher):
    """Stands among ComfyUI's loaded models for what this pack has loaded, to be told when memory is to be freed.

    It has no weights of its own: those are JAX's, which ComfyUI cannot move. Its size is 0, so that loading one of ours
    never makes ComfyUI unload another pack's.
    """

    def __init__(self, release: Callable[[], None]):
        device = comfy.model_management.get_torch_device()
        super().__init__(CogVideoXStages(), load_device=device, offload_device=torch.device("cpu"))
        self._release = release

    def model_size(self) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:  # False: nothing is to be freed
            self._release()
        return super().detach(unpatch_all)


_unloadable: _Unloadable | None = None


def call_when_unloading(release: Callable[[], None]) -> None:
    """Have ComfyUI call `release` at its next "unload models", /free, or when its own models run out of memory."""
    global _unloadable
    if _unloadable is None:
        _unloadable = _Unloadable(release)
    if not any(loaded.model is _unloadable for loaded in comfy.model_management.current_loaded_models):
        comfy.model_management.load_models_gpu([_unloadable])
