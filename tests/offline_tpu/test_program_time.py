"""What runs beside ops, in programs of some lines."""

import pytest

from offline_tpu.hlo.module import HloModule
from offline_tpu.machine import devices
from offline_tpu.machine.constants import FittedConstants
from offline_tpu.machine.links import Grid
from offline_tpu.program_time import ProgramCost

_MIB = 2**20
_COPY = """HloModule jit_f, is_scheduled=true

ENTRY %main (x.0: f32[1024,1024]) -> f32[1024,1024] {
  %x.0 = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %copy-start.1 = (f32[1024,1024]{1,0:T(8,128)S(1)}, f32[1024,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.0)
  ROOT %copy-done.1 = f32[1024,1024]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
}
"""

_ALL_REDUCE = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x.0: f32[1024,1024]) -> f32[1024,1024] {
  %x.0 = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.1 = f32[1024,1024]{1,0:T(8,128)} all-reduce(%x.0), replica_groups={{0,1}}, to_apply=%add
}
"""


def _cost(text: str, device: devices.DeviceSpec, coords: tuple[tuple[int, ...], ...] = ((0, 0, 0),)) -> ProgramCost:
    return ProgramCost(
        HloModule.parse(text),
        lambda computation, op: None,
        vmem_bytes={},
        device=device,
        grid=Grid.around(coords, device.ici_wrap_length),
        trip_counts={},
    )


@pytest.mark.parametrize("chip", ["v6e", "v5p"])
def test_the_cores_of_a_chip_share_a_copy(chip: str) -> None:
    """HBM's bandwidth is one core's part; a chip of two moves half by each, as it does of an op."""
    device = devices.by_name(chip)
    cost = _cost(_COPY, device)
    constants = FittedConstants.of(device)
    seconds = 4 * _MIB / device.cores / constants.hbm_bytes_per_s(device)
    assert cost.walk() == pytest.approx(max(seconds, constants.dma_latency_s))
    assert sum(op.hbm_bytes for op in cost.ops) == 4 * _MIB // device.cores


@pytest.mark.parametrize("chip", ["v6e", "v5p"])
def test_the_cores_of_a_chip_share_a_collective(chip: str) -> None:
    """What a chip reads and writes of HBM is moved by its cores together, over one set of links."""
    device = devices.by_name(chip)
    cost = _cost(_ALL_REDUCE, device, ((0, 0, 0), (1, 0, 0)))
    cost.walk()
    (op,) = cost.ops
    assert op.hbm_bytes == 2 * 4 * _MIB // device.cores
