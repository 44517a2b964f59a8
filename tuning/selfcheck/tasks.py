"""What the self-check does: its parts in order, and the tasks of each on the chips that were found."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from splash_attn import tuned
from splash_attn.types import AttentionShape, BlockSizes, Variant
from tuning.trials import workloads
from tuning.trials.bound import known_device
from tuning.validate import rows as measured_rows
from tuning.validate.rows import MeasuredRow
from tuning.validate.sets import spread

#: Rows of the validation sets that are timed, none of which took longer where it was reported.
ROW_COUNT, _LONGEST_MS = 15, 300.0
#: Programs of several chips.
_JOBS = "tuning.selfcheck.jobs"
_MAKE_STAGE = "pipeline.stages.programs:model_program"
_STAGE_OPS = {"text": "t5_encode", "vae": "cogvideox_vae_batch", "denoise": "cogvideox_denoise_step"}
#: Odd lengths come from the check itself: some rows past a block. Small blocks where the kernel is interpreted.
_CHECK_BLOCKS, _INTERPRETED_BLOCKS = BlockSizes(1024, 1024, 256), BlockSizes(256, 256, 128)
_VARIANTS = (Variant(softmax="online"), Variant(softmax="fixed_bound"), Variant(qk_dtype="int8"))


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to do in a worker.

    Attributes:
      job, payload: what the worker runs; the chip's name is added.
      op, arguments, config: of the row that it becomes; without an op it is a check. A job may itself say the others.
      reported_ms: what others measured of the same call.
    """

    part: str
    name: str
    job: str
    payload: dict[str, Any]
    op: str | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    reported_ms: float | None = None

    @property
    def id(self) -> str:
        return f"{self.part}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the self-check.

    Attributes:
      share: of the whole time, relative to the other parts'.
      tasks: (what was found, see `jobs.environment`) -> its tasks.
      left_out: (what was found) -> why the part does not apply, None where it does.
    """

    name: str
    share: float
    tasks: Callable[[Mapping[str, Any]], list[Task]]
    left_out: Callable[[Mapping[str, Any]], str | None] = lambda found: None


def numerics_tasks(found: Mapping[str, Any]) -> list[Task]:
    """Return a check of each softmax, and of int8, for both widths of heads and both dtypes."""
    on_tpu = found["platform"] == "tpu"
    blocks = _CHECK_BLOCKS if on_tpu else _INTERPRETED_BLOCKS
    cases = [(variant, 64, "bfloat16") for variant in _VARIANTS]
    if on_tpu:
        cases += [(variant, 128, "bfloat16") for variant in _VARIANTS]
    cases.append((Variant(), 64, "float32"))
    return [
        Task(
            "numerics",
            f"{'int8' if variant.qk_dtype == 'int8' else variant.softmax}, head_dim {head_dim}, {dtype}",
            f"{_JOBS}:check_kernel",
            kernel_request(AttentionShape(1, 1, 1, 1, head_dim), dtype, blocks, variant),
        )
        for variant, head_dim, dtype in cases
    ]


def kernel_tasks(found: Mapping[str, Any]) -> list[Task]:
    """Return a timing of each tuned entry of the device; of the default blocks for two workloads where it has none."""
    kind = found["device_kind"]
    entries = [
        (entry.provenance.workload, entry.shape, entry.dtype, entry.block_sizes, entry.variant)
        for entry in tuned.load(kind, tuned.TUNED_DIR)
    ]
    if not entries:
        for workload in map(workloads.load, ("cogvideox_720p", "wan_720p")):
            choice = tuned.choose(kind, workload.shape, workload.dtype, directory=tuned.TUNED_DIR)
            entries.append((workload.name, workload.shape, workload.dtype, choice.block_sizes, choice.variant))
    tasks = []
    for name, shape, dtype, blocks, variant in entries:
        payload = kernel_request(shape, dtype, blocks, variant)
        title = f"{name} {blocks}{' int8' if variant.qk_dtype == 'int8' else ''}"
        arguments = {"shape": payload["shape"], "dtype": dtype}
        config = {**payload["block_sizes"], **payload["options"]} if found["platform"] == "tpu" else {}
        op = "splash_attn" if found["platform"] == "tpu" else "xla_attention"
        tasks.append(Task("kernels", title, f"{_JOBS}:time_kernel", payload, op, arguments, config))
    return tasks


def kernel_request(shape: AttentionShape, dtype: str, blocks: BlockSizes, variant: Variant) -> dict[str, Any]:
    """Return a kernel as `tuning.backends.jobs.Request` has it."""
    return {
        "kernel": "splash_attn",
        "kernel_hash": "",
        "shape": dataclasses.asdict(shape),
        "dtype": dtype,
        "block_sizes": dataclasses.asdict(blocks),
        "options": variant.to_dict(),
        "device": "local",
        "cache_dir": "",
        "measure": {},
    }


def row_tasks(found: Mapping[str, Any]) -> list[Task]:
    """Return a timing of some rows of the validation sets that are of this kind of chip."""
    return [
        Task(
            "programs",
            row.id,
            f"{_JOBS}:time_row",
            {"row": msgspec.to_builtins(row)},
            row.op,
            row.arguments,
            row.config,
            row.time_ms,
        )
        for row in choose_rows(measured_rows.read_shipped(), found["device_kind"], ROW_COUNT)
    ]


def choose_rows(rows: Iterable[MeasuredRow], device_kind: str, count: int) -> list[MeasuredRow]:
    """Return short rows of one chip of that kind, of every op in turn, spread over each op's times."""
    by_op: dict[str, list[MeasuredRow]] = {}
    for row in rows:
        usual = row.p_state is None and row.op not in measured_rows.COLLECTIVES and row.time_ms <= _LONGEST_MS
        if row.device_kind == device_kind and usual:
            by_op.setdefault(row.op, []).append(row)
    places = -(-count // max(len(by_op), 1))
    by_turn = itertools.zip_longest(*(spread(by_op[op], places) for op in sorted(by_op)))
    in_turn = [row for turn in by_turn for row in turn if row is not None]
    return in_turn[:count]


def stage_tasks(stage: str) -> Callable[[Mapping[str, Any]], list[Task]]:
    """Return the timing of one call of a stage: of the published model on TPUs, of the tiny one elsewhere."""

    def tasks(found: Mapping[str, Any]) -> list[Task]:
        model = "cogvideox1.5-5b" if found["platform"] == "tpu" else "tiny"
        payload = {"model": model, "stage": stage, "make": _MAKE_STAGE}
        name = f"{model}, {found['num_devices']} devices"
        return [Task(stage, name, f"{_JOBS}:time_stage", payload, _STAGE_OPS[stage])]

    return tasks


def _no_kernels(found: Mapping[str, Any]) -> str | None:
    only_interpreted = "a CPU runs the kernel interpreted: its times say nothing of a chip"
    return only_interpreted if found["platform"] == "cpu" else None


def _no_programs(found: Mapping[str, Any]) -> str | None:
    if found["platform"] != "tpu":
        return "the rows of the validation sets, and their predictions, are of TPUs"
    return None if "tokamax" in found["versions"] else "needs tokamax; pip install 'cogvideox-splash[peers]'"


#: The look at the machine, on which all others depend.
ENVIRONMENT = Task("environment", "chips and versions", f"{_JOBS}:environment", {})
PARTS = (
    Part("environment", 60, lambda found: [ENVIRONMENT]),
    Part("numerics", 80, numerics_tasks),
    Part("kernels", 100, kernel_tasks, _no_kernels),
    Part("programs", 130, row_tasks, _no_programs),
    Part("text", 50, stage_tasks("text")),
    Part("vae", 80, stage_tasks("vae")),
    Part("denoise", 130, stage_tasks("denoise")),
)


def topology_of(found: Mapping[str, Any]) -> str | None:
    """Return the topology of the devices that were found, as "v6e-8"; None for a chip that is not known."""
    spec = known_device(found["device_kind"])
    return f"{spec.name}-{found['num_devices'] * spec.cores}" if spec else None  # slices are named by TensorCores
