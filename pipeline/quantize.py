"""Command line: `python -m pipeline.quantize output=PATH`. Keeps a transformer's weights in int8."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from pipeline.requests.errors import RequestError, require_choice
from splash_workbench import cli
from splash_workbench.files import require_writable, require_writable_file, user_path


@dataclasses.dataclass
class QuantizeConfig:
    """Keys of the command line."""

    checkpoint: str = "tiny"
    revision: str | None = None
    transformer: str | None = None
    lora: Any = None
    dtype: str = "bfloat16"
    output: str | None = None
    overwrite: bool = False
    cache_dir: str | None = None


@cli.command("quantize", QuantizeConfig, text_or_list=("lora",), interrupted="nothing was written")
def main(settings: QuantizeConfig) -> int:
    """Run the command; return its exit code."""
    if not (settings.output or "").endswith(".safetensors"):
        raise RequestError(f"output={settings.output!r}: expected a file *.safetensors to write")
    output = Path(str(settings.output))
    require_writable_file(f"output={str(output)!r}", output)
    if output.exists() and not settings.overwrite:
        raise RequestError(f"output={str(output)!r}: is there already; give another name, or overwrite=true")
    import torch

    from pipeline.checkpoints.checks import check_transformer, read_configs
    from pipeline.checkpoints.loading import resolve_checkpoint
    from pipeline.checkpoints.quantized import save_quantized
    from pipeline.requests.options import ParallelOptions
    from pipeline.requests.request import AttentionOptions, Dtype, parse_lora
    from pipeline.stages.denoise import Denoiser

    require_choice("dtype", settings.dtype, Dtype)
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
    checkpoint = resolve_checkpoint(settings.checkpoint, settings.revision, cache_dir, settings.transformer)
    configs, loras = read_configs(checkpoint), parse_lora(settings.lora)
    read = [path for path in (checkpoint.folder, settings.transformer, *(lora.path for lora in loras)) if path]
    replaces = output.exists() and any(output.resolve().is_relative_to(user_path(path).resolve()) for path in read)
    parts = [] if checkpoint.folder is None else [checkpoint.part("transformer").resolve()]
    if replaces or output.parent.resolve() in parts:
        raise RequestError(f"output={str(output)!r}: weights are read from there; expected another file")
    if checkpoint.folder is not None:  # int8 of float32 is a quarter, and of no dtype less
        least_bytes = sum(path.stat().st_size for path in checkpoint.weight_files("transformer")) // 4
        require_writable(f"output={str(output)!r}", output.parent, max(1, least_bytes))
    check_transformer(settings.transformer, True, loras, configs["transformer"], settings.checkpoint)
    one_device = ParallelOptions(num_devices=1)
    dtype = getattr(torch, settings.dtype)
    denoiser = Denoiser(checkpoint, dtype, AttentionOptions(), one_device, False, loras, "int8")
    save_quantized(denoiser.weights, denoiser.positions, output)
    print(f"int8 weights: {output}, {output.stat().st_size / 1e9:.2f} GB; use transformer={output} quantization=int8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
