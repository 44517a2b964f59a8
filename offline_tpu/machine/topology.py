"""Reads the names of topologies: so many chips of a slice, or their shape."""

import math
import re

from offline_tpu.machine.devices import DeviceSpec, by_name

#: By number of axes: TensorCores, which slices are named by -> shape of the slice of chips. Sources:
#: https://cloud.google.com/tpu/docs/v6e, where slices are flat and a chip has one, and .../tpu7x and .../v5p, where a
#: chip has two.
SLICE_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {2: "1x1x1", 8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
}
#: By number of axes, the most chips that a pod has: the same sources.
_POD_CHIPS = {2: 256, 3: 9216}


def parse_topology(topology: str) -> tuple[DeviceSpec, str]:
    """Return the device of a topology and the name that libtpu knows it by: "v6e-8" is (v6e, "v6e:2x4").

    Raises:
      ValueError: it is not known.
    """
    if not isinstance(topology, str):
        raise ValueError(f'{topology=}: expected a name, e.g. "v6e-8".')
    name, separator, size = topology.replace(":", "-").partition("-")
    device = by_name(name, given=f"{topology=}")
    platform, _, shape = device.topology.partition(":")
    if not separator:
        return device, device.topology
    axes = shape.count("x") + 1
    slices = SLICE_SHAPES[axes]
    if re.fullmatch("x".join(["[1-9][0-9]*"] * axes), size):
        if math.prod(map(int, size.split("x"))) > _POD_CHIPS[axes]:
            raise ValueError(f"{topology=}: expected at most {_POD_CHIPS[axes]} chips, the largest {name} slice.")
        return device, f"{platform}:{size}"
    if not size.isdigit() or int(size) not in slices:
        counts = ", ".join(map(str, slices))
        raise ValueError(f"{topology=}: expected {name}-N with N one of {counts}, or chips as {name}:{shape}.")
    return device, f"{platform}:{slices[int(size)]}"
