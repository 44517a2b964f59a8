"""Stage "text": prompts -> T5 embeddings."""

import json
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec

from pipeline.checkpoints.loading import Checkpoint, open_module
from pipeline.model.placement import SPLIT, place_all, put, split_mesh, to_host
from pipeline.model.torchax_bridge import jax_function
from pipeline.requests.errors import CheckpointError, NonFiniteError
from pipeline.stages.progress import StageClock

logger = logging.getLogger(__name__)

_SHOWN_LENGTH = 60  # characters


class TextEncoder:
    """A loaded T5 encoder. Keeps its compiled program for the next prompts; drop the object to free its memory."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        """Load tokenizer/ and text_encoder/ of a checkpoint. Raises CheckpointError."""
        devices = jax.devices()
        self._max_text_seq_length = checkpoint.config("transformer")["max_text_seq_length"]
        self._tokenizer = load_tokenizer(checkpoint)  # first: T5 is 9 GB
        with open_module(checkpoint, "text_encoder", dtype) as opened:
            stored = opened.weights.items()
            self._weights = dict(place_all((name, each, weight_sharding(each.shape, devices)) for name, each in stored))
        self._everywhere = NamedSharding(split_mesh(devices, 1), PartitionSpec())
        self._program = encode_program(opened.module, self._everywhere)
        self._compiled: dict[tuple[int, ...], Any] = {}

    def encode(self, prompts: Sequence[str], clock: StageClock | None = None) -> np.ndarray:
        """Return embeddings [len(prompts), max_text_seq_length, text_embed_dim] in the encoder's dtype.

        Prompts are padded, or cut with a warning, to max_text_seq_length tokens; padding is not masked: CogVideoX was
        trained so. Raises NonFiniteError.
        """
        clock = clock or StageClock("text")
        token_ids = put(np.stack([self._token_ids(prompt) for prompt in prompts]), self._everywhere)
        compiled = self._compiled.get(token_ids.shape)
        if compiled is None:
            with clock.measure("compile"):
                compiled = self._program.lower(self._weights, token_ids).compile()
                self._compiled[token_ids.shape] = compiled
        with clock.measure("run"):
            clock.start(1)
            embeddings = to_host(compiled(self._weights, token_ids))
            finite = bool(np.isfinite(embeddings.astype(np.float32)).all())
            clock.tick()
        if not finite:
            raise NonFiniteError(
                "text: the embeddings hold NaN or infinity; try dtype=float32, or check the checkpoint's text_encoder"
            )
        return embeddings

    def _token_ids(self, prompt: str) -> np.ndarray:
        limit = self._max_text_seq_length
        whole = self._tokenizer(prompt, verbose=False)["input_ids"]
        if len(whole) > limit:
            cut = whole[limit - 1 : -1]
            text = textwrap.shorten(self._tokenizer.decode(cut), _SHOWN_LENGTH, placeholder=" ...")
            logger.warning("prompt is longer than %d tokens; the last %d are cut: %r", limit, len(cut), text)
        padded = self._tokenizer(prompt, padding="max_length", max_length=limit, truncation=True)
        return np.asarray(padded["input_ids"], np.int32)


def encode_program(encoder: torch.nn.Module, everywhere: NamedSharding) -> Any:
    """Return `(weights, token ids [prompts, tokens]) -> embeddings` of a stock T5 encoder, the result everywhere."""
    encode = jax_function(encoder)

    @jax.named_scope("text")
    def program(weights: Any, token_ids: jax.Array) -> jax.Array:
        return encode(weights, token_ids, return_dict=False)[0]  # the last hidden state

    return jax.jit(program, out_shardings=everywhere)


def weight_sharding(shape: Sequence[int], devices: Sequence[jax.Device]) -> NamedSharding:
    """Split matrices by rows over as many devices as divide them: T5-XXL is 9 GB, and each prompt reads it once."""
    if len(shape) < 2:
        return NamedSharding(split_mesh(devices, 1), PartitionSpec())
    return NamedSharding(split_mesh(devices, shape[0]), PartitionSpec(SPLIT))


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Read the T5 tokenizer of a checkpoint. Raises CheckpointError."""
    from transformers import T5Tokenizer

    folder = checkpoint.part("tokenizer")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library makes of files that it does not expect
        first_line = (str(error).strip().splitlines() or [""])[0]
        detail = first_line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first_line}"
        broken = next((path.name for path in sorted(folder.glob("*.json")) if not _is_json(path)), "")
        what = f"tokenizer/{broken} is not JSON: " if broken else ""
        raise CheckpointError(
            f"checkpoint={checkpoint.name!r}: {what}cannot read tokenizer/ as a T5 tokenizer ({detail})"
        ) from error


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True
