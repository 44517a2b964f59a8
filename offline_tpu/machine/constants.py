"""Holds the constants of the time model, each with its source. None belongs to a kernel.

Published figures of a device (clock, peak FLOP/s, HBM and ICI bandwidth) are in `devices`. What follows is not
published. The first three are fitted, together, on the 12 rows of tuning/data/measured_v6e_tokamax_splash.json and
on nothing else; `python -m tuning.validate` prints what remains of each row. They are taken over to other devices
as they are, for want of measurements there. The two of the links are taken from a book.
"""

from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.dma import DmaTiming

#: Share of the published HBM bandwidth that streaming DMAs reach.
HBM_EFFICIENCY = 0.88

#: From the start of a DMA to the flag that says it is done, without the transfer itself.
DMA_LATENCY_S = 0.77e-6

#: Bytes moved into or out of VMEM for each TensorCore cycle lost to them: transfers and vector loads and stores want
#: the same memory.
VMEM_BYTES_PER_STOLEN_CYCLE = 1700.0

#: Share of the published link bandwidth that collectives reach. Not fitted: nothing public to fit it on. 0.9 makes
#: v6e's 100 GB/s a link and direction the 9e10 B/s that "How to Scale Your Model" (jax-ml.github.io/scaling-book, TPUs)
#: works with.
ICI_EFFICIENCY = 0.9

#: From one chip to the next. The same book, "Sharded matrices": about a microsecond a hop.
ICI_HOP_LATENCY_S = 1e-6


def dma_timing(device: DeviceSpec) -> DmaTiming:
    """Return the constants in the device's cycles."""
    return DmaTiming(
        bytes_per_cycle=HBM_EFFICIENCY * device.hbm_bytes_per_s / device.clock_hz,
        latency_cycles=DMA_LATENCY_S * device.clock_hz,
        vmem_bytes_per_stolen_cycle=VMEM_BYTES_PER_STOLEN_CYCLE,
    )
