"""Stage "text": prompts -> T5 embeddings."""

import logging
import textwrap
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec

from pipeline.checkpoints.loading import Checkpoint, LoadedModule, load_module
from pipeline.model.placement import SPLIT, put, split_mesh, to_host
from pipeline.model.torchax_bridge import jax_function
from pipeline.requests.errors import CheckpointError, NonFiniteError
from pipeline.stages.progress import Progress, StageTimings, StepClock, no_progress

logger = logging.getLogger(__name__)

_SHOWN_LENGTH = 60  # characters


class TextEncoder:
    """A loaded T5 encoder. Keeps its compiled program for the next prompts; drop the object to free its memory."""

    def __init__(self, loaded: LoadedModule, tokenizer: Any, max_text_seq_length: int, devices: Sequence[jax.Device]):
        self._loaded = loaded
        self._everywhere = NamedSharding(split_mesh(devices, 1), PartitionSpec())
        self._tokenizer = tokenizer
        self._max_text_seq_length = max_text_seq_length
        self._program = encode_program(loaded.module, self._everywhere)
        self._compiled: dict[tuple[int, ...], Any] = {}

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> Self:
        """Load tokenizer/ and text_encoder/ of a checkpoint. Raises CheckpointError."""
        length, devices = checkpoint.config("transformer")["max_text_seq_length"], jax.devices()
        tokenizer = load_tokenizer(checkpoint)  # first: T5 is 9 GB
        loaded = load_module(
            checkpoint,
            "text_encoder",
            dtype,
            place=lambda name, value: put(value, weight_sharding(value.shape, devices)),
        )
        return cls(loaded, tokenizer, length, devices)

    def encode(
        self, prompts: Sequence[str], timings: StageTimings | None = None, progress: Progress = no_progress
    ) -> np.ndarray:
        """Return embeddings [len(prompts), max_text_seq_length, text_embed_dim] in the encoder's dtype.

        Prompts are padded, or cut with a warning, to max_text_seq_length tokens; padding is not masked: CogVideoX was
        trained so. Raises NonFiniteError.
        """
        timings = timings or StageTimings("text")
        token_ids = put(np.stack([self._token_ids(prompt) for prompt in prompts]), self._everywhere)
        compiled = self._compiled.get(token_ids.shape)
        if compiled is None:
            with timings.measure("compile", progress):
                compiled = self._program.lower(self._loaded.weights, token_ids).compile()
                self._compiled[token_ids.shape] = compiled
        with timings.measure("run", progress):
            clock = StepClock(timings, 1, progress)
            embeddings = to_host(compiled(self._loaded.weights, token_ids))
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
    return jax.jit(jax.named_scope("text")(jax_function(encoder, _last_hidden_state)), out_shardings=everywhere)


def weight_sharding(shape: Sequence[int], devices: Sequence[jax.Device]) -> NamedSharding:
    """Split matrices by rows over as many devices as divide them: T5-XXL is 9 GB, and each prompt reads it once."""
    if len(shape) < 2:
        return NamedSharding(split_mesh(devices, 1), PartitionSpec())
    return NamedSharding(split_mesh(devices, shape[0]), PartitionSpec(SPLIT))


def _last_hidden_state(module: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    return module(token_ids, return_dict=False)[0]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Read the T5 tokenizer of a checkpoint. Raises CheckpointError."""
    from transformers import T5Tokenizer

    folder = checkpoint.part("tokenizer")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        detail = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"checkpoint={checkpoint.name!r}: cannot read tokenizer/ as a T5 tokenizer ({detail})"
        ) from error
