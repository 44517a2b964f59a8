"""Settings of JAX that change what is traced change nothing here: the same program for a TPU, the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_tpu import worker_environment
from offline_tpu.machine import devices
from splash_attn import BlockSizes, Variant, attention
from splash_workbench.provenance import REPO_ROOT


@pytest.mark.compile
@pytest.mark.parametrize(
    "dtypes",
    [["bfloat16"], pytest.param(["all", "bfloat16", "float16", "float32"], marks=pytest.mark.slow("2 min"))],
    ids=" ".join,
)
def test_the_program_for_a_tpu_is_the_same_under_every_setting(dtypes: list[str], tmp_path: Path) -> None:
    """For every softmax, settings by turns; the one without settings is compiled too."""
    environment = os.environ | worker_environment(devices.by_name("v6e"), tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(REPO_ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "ambient_programs", *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


@pytest.mark.compile
@pytest.mark.parametrize(
    "settings",
    [
        {"jax_enable_x64": True, "jax_default_matmul_precision": "highest"},
        {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"},
        {"jax_debug_nans": True, "jax_debug_infs": True},  # heads that a kernel leaves alone hold NaN for a while
        {"jax_disable_jit": True},
        {"jax_enable_checks": True, "jax_check_tracer_leaks": True},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_the_numbers_are_the_same(implementation: Any, settings: dict[str, Any]) -> None:
    q = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 24, 16)), jnp.bfloat16)
    options = {"implementation": implementation, "block_sizes": BlockSizes(128, 128, 128)}
    gated = "jax_debug_nans" in settings
    options["variant"] = Variant("fixed_bound" if gated else "online", block_q_compute=128, lookahead=1)
    expected = np.asarray(attention(q, q, q, **options), np.float32)
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        eager = attention(q, q, q, **options)
        traced = jax.jit(lambda q: attention(q, q, q, **options))(q)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert eager.dtype == traced.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(eager, np.float32), expected)
    np.testing.assert_array_equal(np.asarray(traced, np.float32), expected)


def test_nothing_is_transferred_that_was_not_asked_for() -> None:
    q = jnp.ones((1, 2, 24, 16), jnp.bfloat16)
    with jax.transfer_guard("disallow"):
        attention(q, q, q).block_until_ready()


def test_float64_is_refused_under_x64() -> None:
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"q\.dtype=float64: expected one of .*; use q\.astype"):
        attention(*(jnp.ones((1, 1, 5, 8), jnp.float64) for _ in range(3)))
