"""Stage "text": prompts -> T5 embeddings."""

import logging
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pipeline.errors import CheckpointError, NonFiniteError
from pipeline.loading import Checkpoint, LoadedModule, load_module
from pipeline.profiling import Progress, StageTimings, StepClock, no_progress
from pipeline.torchax_bridge import jax_function

logger = logging.getLogger(__name__)


class TextEncoder:
    """A loaded T5 encoder. Keeps its compiled program for the next prompts; drop the object to free its memory."""

    def __init__(self, loaded: LoadedModule, tokenizer: Any, max_text_seq_length: int):
        self._loaded = loaded
        self._tokenizer = tokenizer
        self._max_text_seq_length = max_text_seq_length
        self._program = jax.jit(jax_function(loaded.module, _last_hidden_state))
        self._compiled: dict[tuple[int, ...], Any] = {}

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> Self:
        """Load tokenizer/ and text_encoder/ of a checkpoint. Raises CheckpointError."""
        length = checkpoint.config("transformer").get("max_text_seq_length", 226)
        return cls(load_module(checkpoint, "text_encoder", dtype), load_tokenizer(checkpoint), length)

    def encode(
        self, prompts: Sequence[str], timings: StageTimings | None = None, progress: Progress = no_progress
    ) -> np.ndarray:
        """Embeddings [len(prompts), max_text_seq_length, text_embed_dim] in the encoder's dtype.

        Prompts are padded, or cut with a warning, to max_text_seq_length tokens; padding is not masked: CogVideoX was
        trained so. Raises NonFiniteError.
        """
        timings = timings or StageTimings("text")
        token_ids = jnp.asarray(np.stack([self._token_ids(prompt) for prompt in prompts]))
        compiled = self._compiled.get(token_ids.shape)
        if compiled is None:
            with timings.measure("compile", progress):
                compiled = self._program.lower(self._loaded.weights, token_ids).compile()
                self._compiled[token_ids.shape] = compiled
        with timings.measure("run", progress):
            clock = StepClock(timings, 1, progress)
            embeddings = compiled(self._loaded.weights, token_ids)
            finite = bool(jnp.isfinite(embeddings).all())
            clock.tick()
        if not finite:
            raise NonFiniteError(
                "text: the embeddings hold NaN or infinity; try dtype=float32, or check the checkpoint's text_encoder"
            )
        return np.asarray(embeddings)

    def _token_ids(self, prompt: str) -> np.ndarray:
        limit = self._max_text_seq_length
        whole = self._tokenizer(prompt)["input_ids"]
        if len(whole) > limit:
            cut = self._tokenizer.decode(whole[limit - 1 : -1])
            logger.warning("prompt is longer than %d tokens; this part of it is not used: %r", limit, cut)
        padded = self._tokenizer(prompt, padding="max_length", max_length=limit, truncation=True)
        return np.asarray(padded["input_ids"], np.int32)


def _last_hidden_state(module: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    return module(token_ids, return_dict=False)[0]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The T5 tokenizer of a checkpoint. Raises CheckpointError."""
    from transformers import T5Tokenizer

    folder = checkpoint.part("tokenizer")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        detail = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"checkpoint={checkpoint.name!r}: cannot read tokenizer/ as a T5 tokenizer ({detail})"
        ) from error
