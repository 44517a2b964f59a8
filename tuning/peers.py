"""Our kernel beside others, compiled for the same workload and device: `python -m tuning.peers --help`."""

import concurrent.futures
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from tqdm import tqdm

from splash_attn import tuned
from splash_attn.types import SEED_BLOCK_SIZES, BlockSizes
from splash_workbench import cli, provenance
from splash_workbench.errors import from_config
from splash_workbench.files import require_writable
from splash_workbench.records import jsonl
from splash_workbench.status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Runner
from splash_workbench.workers.room import check_timeout_s, worker_count
from tuning.backends.base import context_of
from tuning.backends.evaluate import Evaluator
from tuning.backends.kernels import KERNELS
from tuning.backends.offline import OFFLINE
from tuning.search.schemas import DeviceSchema, WorkloadSchema
from tuning.trials import records, tables
from tuning.trials.records import Trial, objective
from tuning.trials.workloads import Workload

_HIDDEN = ("record_id", "created_at", "workload", "shape", "device", "backend", "dtype")


@dataclasses.dataclass
class PeerSchema:
    """One configuration of a peer; becomes an Entrant."""

    kernel: str = MISSING
    block_q: int = MISSING
    block_kv: int = MISSING
    block_kv_compute: int = MISSING
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PeersSchema:
    """Fields of configs/peers.yaml."""

    workload: WorkloadSchema = dataclasses.field(default_factory=WorkloadSchema)
    device: DeviceSchema = dataclasses.field(default_factory=DeviceSchema)
    peers: list[PeerSchema] = dataclasses.field(default_factory=list)
    workers: int | None = None
    timeout_s: float = MISSING
    results_dir: str = MISSING
    reuse: bool = MISSING
    json: str | None = None


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A kernel in one configuration."""

    kernel: str
    block_sizes: BlockSizes
    options: dict[str, Any]


def entrants(peers: Sequence[PeerSchema], workload: Workload, device_kind: str) -> tuple[list[Entrant], list[str]]:
    """Return ours and the installed peers, and a line for the user about each that is missing or changed.

    Raises ValueError for an unknown kernel or invalid block sizes.
    """
    choice = tuned.choose(device_kind, workload.shape, workload.dtype)
    options = choice.variant.to_dict()
    ours = (choice.block_sizes, tuned.clamp(SEED_BLOCK_SIZES, workload.shape))
    found = [Entrant("splash_attn", block_sizes, options) for block_sizes in dict.fromkeys(ours)]
    quantized = tuned.choose(device_kind, workload.shape, workload.dtype, qk_dtype="int8")
    if quantized.entry is not None:
        found.append(Entrant("splash_attn", quantized.block_sizes, quantized.variant.to_dict()))
    lines = [f"splash_attn runs {choice.reason}"]
    for peer in peers:
        if peer.kernel not in KERNELS:
            raise ValueError(f"peers.kernel={peer.kernel!r}: expected one of {', '.join(KERNELS)}.")
        kernel = KERNELS[peer.kernel]
        if kernel.installed:
            listed = BlockSizes(peer.block_q, peer.block_kv, peer.block_kv_compute)
            entrant = Entrant(peer.kernel, tuned.clamp(listed, workload.shape), peer.options)
            if entrant.block_sizes != listed:
                lines.append(f"{peer.kernel}: {listed} is shortened to the sequences, {entrant.block_sizes}")
            if entrant not in found:
                found.append(entrant)
        else:
            lines.append(f"{peer.kernel} is left out: not installed; pip install 'cogvideox-splash[{kernel.extra}]'")
    return found, list(dict.fromkeys(lines))


@cli.command("peers", PeersSchema)
def main(settings: PeersSchema) -> int:
    """Run the command; return its exit code."""
    workload = settings.workload.frozen()
    workers = from_config(lambda: worker_count(settings.workers))
    from_config(lambda: check_timeout_s(settings.timeout_s))
    target = OFFLINE.find_target(settings.device.name)
    entered, lines = from_config(lambda: entrants(settings.peers, workload, target.device_kind))
    results_dir = Path(settings.results_dir)
    require_writable(f"results_dir={results_dir}", results_dir)
    for line in (f"{workload.name}: {workload.shape} {workload.dtype} on {target.device_kind}", *lines):
        print(line)
    captured = provenance.capture(OFFLINE.sources)
    context = context_of(workload, target, OFFLINE, captured)
    path = results_dir / "peers" / f"{workload.name}-{target.name}-{context[:8]}" / records.TRIALS_FILE
    recorded = from_config(lambda: records.read(path)) if settings.reuse else []
    reused = records.reusable(recorded, settings.timeout_s)
    on_record = {(trial.kernel, trial.key): trial for trial in reused}
    with tempfile.TemporaryDirectory() as work_dir:
        evaluator = Evaluator(
            runner=Runner(Path(work_dir), jobs_per_worker=JOBS_PER_WORKER),
            cache=JobCache.of_user(settings.reuse),
            workload=workload,
            target=target,
            backend=OFFLINE,
            context=context,
            environment=captured,
            timeout_s=settings.timeout_s,
            measure={},
            cache_dir=results_dir / "sweeps" / ".numerics",
        )
        trials = _evaluate(entered, evaluator, on_record, path, workers)
    trials.sort(key=lambda trial: (trial.status is not Status.OK, objective(trial)))
    print(tables.table(trials, hide=_HIDDEN, one_variant_column=True, units=True))
    for line in tables.note_lines(trials):
        print(line)
    cli.write_json(settings.json, {"workload": workload.name, "device": target.name, "trials": tables.rows(trials)})
    return 0 if all(trial.status is Status.OK for trial in trials) else 1


def _evaluate(
    entered: list[Entrant], evaluator: Evaluator, on_record: dict[tuple[str, str], Trial], path: Path, workers: int
) -> list[Trial]:
    """Return one trial for each entrant: those on record, and the others made and recorded now."""

    def trial_of(entrant: Entrant) -> Trial:
        reused = on_record.get((entrant.kernel, records.config_key(entrant.block_sizes, entrant.options)))
        if reused is not None:
            return reused
        trial = evaluator.evaluate(entrant.block_sizes, entrant.options, entrant.kernel)
        jsonl.append(path, trial)
        return trial

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        return list(tqdm(pool.map(trial_of, entered), total=len(entered), unit="kernel", leave=False))
    finally:
        evaluator.runner.cancel()
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
