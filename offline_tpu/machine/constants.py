"""Holds the constants of the time model, each with its source. None belongs to a kernel or a program.

Published figures of a device (clock, peak FLOP/s, HBM and ICI bandwidth) are in `devices`. What follows is not
published. CYCLE_EFFICIENCY, HBM_EFFICIENCY, HBM_SUSTAINED, DMA_LATENCY_S, VMEM_BYTES_PER_STOLEN_CYCLE and OP_OVERHEAD_S
are fitted on the rows of tuning/data/measured, as the clock of v7x is, by `python -m tuning.validate.fit`;
docs/predictions.md tells what remains with each program left out of the fit. Those of the links have their sources
beside them.
"""

import dataclasses
from typing import Self

from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.dma import CoreTiming

#: Of the cycles of the published clock, the share in which a bundle of the schedule is issued. Why the rest is lost the
#: compiler does not say. Fitted by hand with one for each device, they come out from 0.96 to 0.98.
CYCLE_EFFICIENCY = 0.962

#: By device, share of the published HBM bandwidth that streaming DMAs reach.
HBM_EFFICIENCY = {"v6e": 0.87, "v5e": 0.90, "v5p": 0.921, "v7x": 0.877}

#: By device, the share of that bandwidth which can be kept up, and the seconds for which all of it can; see
#: offline_tpu.machine.sustained. Of the others no row shows a limit.
HBM_SUSTAINED = {"v6e": (0.78, 10e-3)}

#: From the start of a DMA to the flag that says it is done, without the transfer itself.
DMA_LATENCY_S = 0.75e-6

#: Bytes moved into or out of VMEM for each TensorCore cycle lost to them: transfers, vector loads and stores want the
#: same memory.
VMEM_BYTES_PER_STOLEN_CYCLE = 9000.0

#: From the end of one op to the first bundle of the next.
OP_OVERHEAD_S = 0.24e-6

#: Share of the published link bandwidth that collectives reach. The three all-gathers over the 2x2x1 chips of a v7x
#: that tuning/data/measured has reach 0.89 of it; "How to Scale Your Model" (jax-ml.github.io/scaling-book, TPUs) works
#: with 0.9 for v6e. The one sum over a whole v6e-256 there reaches 0.6.
ICI_EFFICIENCY = 0.9

#: From the start of a collective on v7x's SparseCores to its first bytes, by the smallest of the same all-gathers.
SPARSE_CORE_START_S = 12e-6

#: From one chip to the next. The same book, "Sharded matrices": about a microsecond a hop.
ICI_HOP_LATENCY_S = 1e-6


@dataclasses.dataclass(frozen=True)
class FittedConstants:
    """The fitted constants of one device. The device's clock is its own: `dataclasses.replace(device, clock_hz=...)`.

    Attributes: as the constants of the same names.
    """

    hbm_efficiency: float
    cycle_efficiency: float = CYCLE_EFFICIENCY
    vmem_bytes_per_stolen_cycle: float = VMEM_BYTES_PER_STOLEN_CYCLE
    dma_latency_s: float = DMA_LATENCY_S
    op_overhead_s: float = OP_OVERHEAD_S
    hbm_sustained_share: float = 1.0
    hbm_burst_s: float = 0.0

    @classmethod
    def of(cls, device: DeviceSpec) -> Self:
        """Return those in use."""
        share, burst_s = HBM_SUSTAINED.get(device.name, (1.0, 0.0))
        return cls(
            HBM_EFFICIENCY[device.name],
            hbm_sustained_share=share,
            hbm_burst_s=burst_s,
        )

    def issue_hz(self, device: DeviceSpec) -> float:
        """Return the bundles that are issued in a second."""
        return self.cycle_efficiency * device.clock_hz

    def hbm_bytes_per_s(self, device: DeviceSpec) -> float:
        """Return the bandwidth that streaming DMAs reach."""
        return self.hbm_efficiency * device.hbm_bytes_per_s

    def core_timing(self, device: DeviceSpec) -> CoreTiming:
        """Return the constants in cycles in which a bundle is issued."""
        issue_hz = self.issue_hz(device)
        return CoreTiming(
            bytes_per_cycle=self.hbm_bytes_per_s(device) / issue_hz,
            latency_cycles=self.dma_latency_s * issue_hz,
            vmem_bytes_per_stolen_cycle=self.vmem_bytes_per_stolen_cycle,
            matmul_cycles=device.matmul_cycles,
            cores=device.cores,
        )


def core_timing(device: DeviceSpec) -> CoreTiming:
    """Return the constants in use, in cycles in which a bundle is issued."""
    return FittedConstants.of(device).core_timing(device)
