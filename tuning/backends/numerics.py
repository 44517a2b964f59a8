"""Check a candidate kernel: the same blocks and variant on a small odd shape, against the reference."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

import splash_attn
from splash_attn.api import Implementation
from splash_attn.gates import INT8_ERROR_BUDGET
from splash_workbench.files import atomic_path
from splash_workbench.provenance import COMPILER_PACKAGES, package_versions, source_hash, stable_hash
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status
from tuning.backends.jobs import Request
from tuning.backends.kernels import KERNELS, Attention
from tuning.trials.records import Numerics

_SOURCES = ("tuning/backends/numerics.py", "tuning/backends/kernels.py", "splash_attn/reference.py")
#: Rows past one whole block: two blocks each way with a partial second one, of prime and distinct size.
_EXTRA_Q, _EXTRA_KV = 211, 307
#: Largest base-2 logit that each head can have: one that the fixed-bound softmax takes, one that it does not.
_BOUNDS = (50.0, 120.0)
#: With int8, whose error grows with it, also: the first is the only head that runs in int8.
_INT8_BOUNDS = (16.0, 50.0, 120.0)

#: Limits of ||actual - expected|| / ||expected|| over all rows, and of the worst row. bfloat16 rounds q * scale,
#: k - mean(k), the probabilities and the output, each by up to 2^-8 of itself; with logits of deviation 2.5 (first
#: head) to 6 (second) that comes to 0.007 over all and 0.04 in the worst of some thousand rows. A row that is wrong is
#: off by about 1. float32 has the same limits: the Pallas kernels multiply in bfloat16 whatever the input.
TOLERANCES = {"bfloat16": (2**-6, 2**-3), "float32": (2**-6, 2**-3)}
#: int8: the error that it is allowed, which is for the rms; for the worst row the same share more as above.
INT8_TOLERANCE = (INT8_ERROR_BUDGET, 8 * INT8_ERROR_BUDGET)


def check_numerics(request: Request, implementation: Implementation) -> dict[str, Any]:
    """Check the candidate against the reference. Return status, numerics and, where it is wrong, an error."""
    found = check_once(request, implementation, request.attention(implementation))
    fields = {"numerics": dataclasses.asdict(found)}
    if found.passed:
        return fields | {"status": Status.OK}
    error = (
        f"rms_error={found.rms_error:.2e} (limit {found.tolerance:.2e}), "
        f"max_row_error={found.max_row_error:.2e} (limit {found.row_tolerance:.2e})"
    )
    return fields | {"status": Status.WRONG, "error": error}


def check_path(request: Request, implementation: Implementation) -> Path:
    """Return where a check is kept, named by everything that its outcome depends on."""
    options = request.options
    if implementation == "pallas_interpret":
        # What only the TPU compiler sees changes nothing here: such candidates share one check.
        compile_only = KERNELS[request.kernel].compile_only
        options = {name: value for name, value in options.items() if name not in compile_only}
    blocks = dataclasses.asdict(request.block_sizes)
    call = [request.kernel, request.kernel_hash, request.shape.head_dim, request.dtype, blocks, options, implementation]
    return Path(request.cache_dir) / f"{stable_hash(json.dumps([*call, _checker()], sort_keys=True))}.json"


@functools.cache
def _checker() -> str:
    """Return what a check depends on besides the candidate: this file, the reference, versions."""
    return json.dumps([source_hash(_SOURCES), package_versions(COMPILER_PACKAGES)], sort_keys=True)


def check_once(request: Request, implementation: Implementation, attention: Attention) -> Numerics:
    """Return the check from the cache, or made now and put there if that can be written."""
    path = check_path(request, implementation)
    with contextlib.suppress(OSError, ValueError, RecursionError):  # absent, torn by a full disk, or not ours
        found = decode(json.loads(path.read_bytes()), Numerics)
        ran = (found.implementation, found.block_sizes, found.tolerance, found.row_tolerance)
        negative = min(found.rms_error, found.max_row_error, found.max_abs_error) < 0
        if ran == (implementation, str(request.block_sizes), *_tolerances(request)) and not negative:
            return found
    numerics = check(request, implementation, attention)
    with contextlib.suppress(OSError), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(numerics)))
    return numerics


def _tolerances(request: Request) -> tuple[float, float]:
    """Return the limits of the error over all rows and of the worst row."""
    return INT8_TOLERANCE if request.options.get("qk_dtype") == "int8" else TOLERANCES[request.dtype]


def check(request: Request, implementation: Implementation, attention: Attention) -> Numerics:
    """Run `attention` on two heads, just past one block of q and one of kv, and compare.

    The keys have a common offset, as before K-smoothing. Few keys dominate each row, so that a key too many or too few,
    or a lost rescale, shows. The largest |q| max|k - mean(k)| of the two heads lie to either side of what the
    fixed-bound softmax takes (about 112 base-2 exponents at these lengths): every way through a kernel is checked.
    """
    import jax.numpy as jnp

    blocks, head_dim = request.block_sizes, request.shape.head_dim
    q_seq_len, kv_seq_len = blocks.block_q + _EXTRA_Q, blocks.block_kv + _EXTRA_KV
    if not KERNELS[request.kernel].exact_at_any_length:
        q_seq_len, kv_seq_len = 2 * blocks.block_q, 2 * blocks.block_kv
    rng = np.random.default_rng(0)

    int8 = request.options.get("qk_dtype") == "int8"
    bounds = np.array(_INT8_BOUNDS if int8 else _BOUNDS, np.float32)

    def normal(rows: int) -> np.ndarray:
        return rng.standard_normal((1, len(bounds), rows, head_dim), dtype=np.float32)

    q, k, v = normal(q_seq_len), normal(kv_seq_len), normal(kv_seq_len)
    longest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    q *= bounds[:, None, None] / (longest * head_dim**-0.5 * np.log2(np.e))
    k += 2.0
    arguments = [jnp.asarray(x, dtype=request.dtype) for x in (q, k, v)]
    actual = np.asarray(attention(*arguments)).astype(np.float32)
    expected = np.asarray(splash_attn.attention_reference(*arguments, dtype=np.float64)).astype(np.float32)
    if actual.shape != expected.shape:
        raise ValueError(f"output shape {actual.shape}: expected {expected.shape}.")
    difference = actual - expected
    rows = np.linalg.norm(difference, axis=-1) / np.linalg.norm(expected, axis=-1)
    tolerance, row_tolerance = _tolerances(request)
    return Numerics(
        implementation=implementation,
        q_seq_len=q_seq_len,
        kv_seq_len=kv_seq_len,
        num_heads=len(bounds),
        block_sizes=str(blocks),
        rms_error=float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        max_row_error=float(rows.max()),
        max_abs_error=float(np.abs(difference).max()),
        tolerance=tolerance,
        row_tolerance=row_tolerance,
    )
