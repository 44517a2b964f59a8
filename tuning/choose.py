"""Show which block sizes and variant attention() would use for a shape, and why: `python -m tuning.choose --help`."""

import dataclasses
import sys
from typing import Any

from offline_tpu.machine import devices
from splash_attn import tuned
from splash_workbench import cli, provenance
from splash_workbench.errors import from_config
from tuning.search.schemas import DeviceSchema, WorkloadSchema


@dataclasses.dataclass
class ChooseSchema:
    """Fields of configs/choose.yaml."""

    workload: WorkloadSchema = dataclasses.field(default_factory=WorkloadSchema)
    device: DeviceSchema = dataclasses.field(default_factory=DeviceSchema)
    qk_dtype: str = "bfloat16"
    json: str | None = None


@cli.command("choose", ChooseSchema)
def main(settings: ChooseSchema) -> int:
    """Run the command; return its exit code."""
    workload = settings.workload.frozen()
    device = from_config(lambda: devices.by_name(settings.device.name))
    qk_dtype: Any = settings.qk_dtype  # checked by choose
    choice = from_config(lambda: tuned.choose(device.device_kind, workload.shape, workload.dtype, qk_dtype=qk_dtype))
    present = provenance.source_hash(provenance.KERNEL_SOURCES)
    stale = choice.entry is not None and choice.entry.provenance.kernel_hash != present
    lines = {
        "shape": f"{workload.shape} {workload.dtype} on {device.device_kind}",
        "block sizes": str(choice.block_sizes),
        "variant": ", ".join(f"{name}={value}" for name, value in choice.variant.to_dict().items()),
        "why": choice.reason,
    }
    if choice.entry is not None:
        by = choice.entry.provenance
        lines["entry"] = f"{choice.entry.block_sizes}, record {by.record_id}, commit {by.git_commit}"
    if stale:
        lines["note"] = "the entry was tuned with another kernel source; sweep again to be sure of it"
    for name, value in lines.items():
        print(f"{name + ':':<13}{value}")
    about = {"shape": dataclasses.asdict(workload.shape), "dtype": workload.dtype, "device_kind": device.device_kind}
    chosen = {
        "block_sizes": dataclasses.asdict(choice.block_sizes),
        "variant": choice.variant.to_dict(),
        "reason": choice.reason,
        "entry": choice.entry.to_dict() if choice.entry else None,
        "stale": stale,
    }
    cli.write_json(settings.json, about | chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
