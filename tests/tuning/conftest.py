"""Shared by the tests of tuning."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S
from offline_tpu.prediction import OpCost
from splash_attn.types import AttentionShape, BlockSizes, Variant
from splash_workbench.provenance import KERNEL_SOURCES, Environment, source_hash
from splash_workbench.trial_status import Label, Status
from splash_workbench.workers.pool import Runner
from tuning.backends.base import Target
from tuning.backends.evaluate import Evaluator
from tuning.backends.interpret import INTERPRET
from tuning.search.settings import SweepSettings
from tuning.search.space import Space
from tuning.search.study import SearchSettings
from tuning.trials.promote import todays_choice
from tuning.trials.records import Numerics, Trial
from tuning.trials.workloads import Workload

SHAPE = AttentionShape(batch_size=1, num_heads=3, q_seq_len=1021, kv_seq_len=1013, head_dim=64)
ENVIRONMENT = Environment(
    versions={"jax": "0.10.2"},
    flags={},
    git_commit=None,
    git_dirty=False,
    kernel_hash=source_hash(KERNEL_SOURCES),
    backend_hash="b1",
    host="x86_64-linux",
    cpu_count=2,
)
NUMERICS = Numerics(
    implementation="pallas_interpret",
    q_seq_len=467,
    kv_seq_len=563,
    num_heads=2,
    block_sizes="256/256/128",
    rms_error=0.004,
    max_row_error=0.02,
    max_abs_error=0.03,
    tolerance=2**-6,
    row_tolerance=2**-3,
)
#: Fields of an OpCost that the tests' ops leave out.
OP: dict[str, Any] = {
    "name": "op",
    "scope": "",
    "category": "kernel",
    "time_s": 0.0,
    "cycles": 0,
    "stall_cycles": 0.0,
    "calls": 1,
    "hbm_bytes": 0,
    "bound": "compute",
    "vmem_bytes": 0,
    "spill_count": 0,
    "fill_count": 0,
    "utilization": {},
    "unresolved": (),
    "collective": None,
    "start_s": 0.0,
}
BLOCKS = BlockSizes(block_q=256, block_kv=512, block_kv_compute=128)


@pytest.fixture
def make_trial() -> Callable[..., Trial]:
    """A trial that is ok unless told otherwise. ops: fields of each that are not as in OP."""

    def make(**changes: Any) -> Trial:
        changes["ops"] = tuple(OpCost(**(OP | op)) for op in changes.get("ops", ()))
        ok = changes.get("status", Status.OK) is Status.OK
        defaults: dict[str, Any] = {
            "context": "c1",
            "kernel": "splash_attn",
            "workload": "tiny",
            "shape": SHAPE,
            "dtype": "bfloat16",
            "device": "v6e",
            "device_kind": "TPU v6 lite",
            "backend": "offline",
            "block_sizes": BLOCKS,
            "variant": Variant().to_dict(),
            "status": Status.OK,
            "environment": ENVIRONMENT,
            "label": Label.PREDICTED if ok else None,
            "time_samples_ms": (12.5,) if ok else (),
            "numerics": NUMERICS,
        }
        return Trial(**(defaults | changes))

    return make


@pytest.fixture
def todays() -> Callable[..., Trial]:
    """The trial of what would run today in the place of a winner: (winner, folder of tuned entries)."""

    def make(winner: Trial, directory: Path | None = None, **changes: Any) -> Trial:
        choice = todays_choice(winner, directory)
        assert choice is not None
        todays = {"block_sizes": choice.block_sizes, "variant": choice.variant.to_dict(), "record_id": "today"}
        return dataclasses.replace(winner, **todays, conclusive=None, **changes)

    return make


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., SweepSettings]:
    """A sweep over block sizes 128..1024 of a small shape, with results in a folder of the test's own."""

    def make(**changes: Any) -> SweepSettings:
        defaults = {
            "workload": Workload("tiny", SHAPE, "bfloat16"),
            "device": "v6e",
            "backend": INTERPRET,
            "measure": {},
            "search": SearchSettings(sampler="grid", max_trials=None, seed=0),
            "space": Space(
                "test", {"block_q": (128, 256, 384), "block_kv": (256, 512), "block_kv_compute": (128, 256)}
            ),
            "workers": 2,
            "timeout_s": PLENTY_S,
            "vmem_pruning": False,
            "results_dir": tmp_path / "results",
            "reuse": False,
            "promote": False,
            "progress": False,
        }
        return SweepSettings(**(defaults | changes))

    return make


@pytest.fixture
def make_evaluator(tmp_path: Path) -> Callable[..., Evaluator]:
    """An evaluator of the small shape that runs the named job; each has a cache of its own."""

    def make(job: str, **changes: Any) -> Evaluator:
        defaults: dict[str, Any] = {
            "runner": Runner(tmp_path / "work"),
            "workload": Workload("tiny", SHAPE, "bfloat16"),
            "target": Target("v6e", "TPU v6 lite", None),
            "backend": dataclasses.replace(INTERPRET, job=job),
            "context": "c1",
            "environment": ENVIRONMENT,
            "timeout_s": PLENTY_S,
            "measure": {"min_samples": 6, "max_samples": 6},
            "cache_dir": tmp_path / job.replace(":", "_"),
        }
        return Evaluator(**(defaults | changes))

    return make
