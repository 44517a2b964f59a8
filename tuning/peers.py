"""Our kernel beside others, compiled for the same workload and device: `python -m tuning.peers --help`."""

import concurrent.futures
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING
from tqdm import tqdm

from splash_attn import tuned
from splash_attn.types import SEED_BLOCK_SIZES, BlockSizes, clamp
from splash_workbench import cli
from splash_workbench.errors import from_config
from splash_workbench.files import require_writable
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Runner
from splash_workbench.workers.room import check_timeout_s, worker_count
from tuning.backends.base import context_of
from tuning.backends.evaluate import Evaluator
from tuning.backends.offline import OFFLINE
from tuning.kernels.attention import ATTENTION_KERNELS
from tuning.search.schemas import DeviceSchema, WorkloadSchema
from tuning.trials import records, tables
from tuning.trials.records import Trial, objective
from tuning.trials.workloads import Workload

_HIDDEN = ("record_id", "created_at", "workload", "shape", "device", "backend", "dtype")


@dataclasses.dataclass
class PeerSchema:
    """One configuration of a peer."""

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


class Entrant(NamedTuple):
    """A kernel in one configuration, as `Evaluator.evaluate` takes it."""

    block_sizes: BlockSizes
    options: dict[str, Any]
    kernel: str = "splash_attn"


def entrants(peers: Sequence[PeerSchema], workload: Workload, device_kind: str) -> tuple[list[Entrant], list[str]]:
    """Return ours and the installed peers, and a line for the user about each that is missing or changed.

    Raises ValueError for an unknown kernel or invalid block sizes.
    """
    choice = tuned.choose(device_kind, workload.shape, workload.dtype)
    options = choice.variant.to_dict()
    ours = (choice.block_sizes, clamp(SEED_BLOCK_SIZES, workload.shape))
    found = [Entrant(block_sizes, options) for block_sizes in dict.fromkeys(ours)]
    quantized = tuned.choose(device_kind, workload.shape, workload.dtype, qk_dtype="int8")
    if quantized.entry is not None:
        found.append(Entrant(quantized.block_sizes, quantized.variant.to_dict()))
    lines = [f"splash_attn runs {choice.reason}"]
    kernels = {kernel.name: kernel for kernel in ATTENTION_KERNELS}
    for peer in peers:
        if peer.kernel not in kernels:
            raise ValueError(f"peers.kernel={peer.kernel!r}: expected one of {', '.join(kernels)}.")
        kernel = kernels[peer.kernel]
        if not kernel.installed:
            lines.append(f"{peer.kernel} is left out: not installed; pip install 'cogvideox-splash[{kernel.extra}]'")
            continue
        listed = BlockSizes(peer.block_q, peer.block_kv, peer.block_kv_compute)
        entrant = Entrant(clamp(listed, workload.shape), peer.options, peer.kernel)
        if entrant.block_sizes != listed:
            lines.append(f"{peer.kernel}: {listed} is shortened to the sequences, {entrant.block_sizes}")
        if entrant not in found:
            found.append(entrant)
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
    print(f"{workload.name}: {workload.shape} {workload.dtype} on {target.device_kind}", *lines, sep="\n")
    captured = OFFLINE.capture(OFFLINE.sources)
    context = context_of(workload, target, OFFLINE, captured)
    path = results_dir / "peers" / f"{workload.name}-{target.name}-{context[:8]}" / records.TRIALS_FILE
    recorded = from_config(lambda: records.read(path)) if settings.reuse else []
    on_record = {(trial.kernel, trial.key): trial for trial in records.reusable(recorded, settings.timeout_s)}
    with tempfile.TemporaryDirectory() as work_dir:
        cache = JobCache.of_user(settings.reuse)
        evaluator = Evaluator(
            runner=Runner(Path(work_dir) / "work", jobs_per_worker=JOBS_PER_WORKER),
            cache=cache,
            workload=workload,
            target=target,
            backend=OFFLINE,
            context=context,
            environment=captured,
            timeout_s=settings.timeout_s,
            measure={},
            cache_dir=(cache.directory if cache else Path(work_dir)) / "numerics",
        )

        def trial_of(entrant: Entrant) -> Trial:
            key = (entrant.kernel, records.config_key(entrant.block_sizes, entrant.options))
            if key in on_record:
                return on_record[key]
            trial = evaluator.evaluate(*entrant)
            jsonl.append(path, trial)
            return trial

        pool = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            trials = list(tqdm(pool.map(trial_of, entered), total=len(entered), unit="kernel", leave=False))
        finally:
            evaluator.runner.cancel()
            pool.shutdown(cancel_futures=True)
    trials.sort(key=lambda trial: (trial.status is not Status.OK, objective(trial)))
    print(tables.table(trials, hide=_HIDDEN, one_variant_column=True, units=True))
    for line in tables.note_lines(trials):
        print(line)
    cli.write_json(settings.json, {"workload": workload.name, "device": target.name, "trials": tables.rows(trials)})
    return 0 if all(trial.status is Status.OK for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
