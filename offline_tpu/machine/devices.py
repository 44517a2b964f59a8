"""Lists what each TPU generation offers, with the source of each figure."""

import dataclasses
from collections.abc import Mapping
from typing import Self

#: The compiler option that sets the clock's power state, of devices that have some.
P_STATE_OPTION = "xla_tpu_dvfs_p_state"


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """One TPU chip as XLA sees it (one JAX device); one core's half of a chip whose two cores share ops.

    Attributes:
      name: the short name used on command lines, e.g. "v6e".
      device_kind: what `jax.Device.device_kind` says.
      topology: a single-host topology that libtpu compiles for, e.g. "v6e:2x4".
      accelerator_type: value of TPU_ACCELERATOR_TYPE for that topology.
      clock_hz: TensorCore clock: peak FLOP/s divided by the MXU's FLOPs a cycle, unless `source` says otherwise.
      peak_bf16_flops_per_s: dense bf16 peak of one JAX device.
      hbm_bytes_per_s, hbm_bytes: HBM bandwidth and size of one JAX device.
      vmem_bytes: on-chip vector memory of one TensorCore.
      matmul_cycles: cycles from one matmul of a packed register (16 rows of bfloat16) to the next, over all of a core's
        matrix units: 2 * 16 * K * N FLOPs over the FLOPs of a cycle, with K x N the size of a unit.
      ici_link_bytes_per_s: bandwidth of one link between neighbouring chips, in one direction.
      ici_wrap_length: an axis of a slice closes into a ring where its length is a multiple of this.
      source: where the figures are published.
      devices_per_chip: JAX devices that one chip is.
      cores: TensorCores that share the ops of a device; the figures above are one core's.
      p_states: clocks by libtpu's DVFS p_state; empty: it has none. `clock_hz` is that of the default.
    """

    name: str
    device_kind: str
    topology: str
    accelerator_type: str
    clock_hz: float
    peak_bf16_flops_per_s: float
    hbm_bytes_per_s: float
    hbm_bytes: int
    vmem_bytes: int
    ici_link_bytes_per_s: float
    ici_wrap_length: int
    source: str
    matmul_cycles: float
    devices_per_chip: int = 1
    cores: int = 1
    p_states: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def fastest_clock_hz(self) -> float:
        return max(self.clock_hz, *self.p_states.values(), 0.0)

    @property
    def flops_per_cycle(self) -> float:
        return self.peak_bf16_flops_per_s / self.fastest_clock_hz

    def at_p_state(self, options: Mapping[str, str]) -> Self:
        """Return the device at the clock that compiler options set.

        Raises:
          ValueError: the clock of that p_state is not known.
        """
        if P_STATE_OPTION not in options:
            return self
        known = {str(state): clock_hz for state, clock_hz in self.p_states.items()}
        if options[P_STATE_OPTION] not in known:
            raise ValueError(
                f"compiler_options: {P_STATE_OPTION}={options[P_STATE_OPTION]}: the clock of {self.name} is known for "
                f"{', '.join(known) or 'no p_state: it has none'}."
            )
        return dataclasses.replace(self, clock_hz=known[options[P_STATE_OPTION]])


_GB = 10**9
_GIB = 2**30
_MIB = 2**20

DEVICES = {
    spec.name: spec
    for spec in (
        DeviceSpec(
            name="v6e",
            device_kind="TPU v6 lite",
            topology="v6e:2x4",
            accelerator_type="v6e-8",
            clock_hz=1.75e9,
            peak_bf16_flops_per_s=918e12,
            hbm_bytes_per_s=1638 * _GB,
            hbm_bytes=32 * _GIB,
            vmem_bytes=128 * _MIB,
            ici_link_bytes_per_s=100 * _GB,
            ici_wrap_length=16,
            source="https://cloud.google.com/tpu/docs/v6e; 918 TFLOP/s over two 256x256 MXUs is 1.75 GHz; 800 GB/s of "
            "bidirectional ICI a chip over 4 ports; a 2D torus at its full 16 x 16, a mesh below",
            matmul_cycles=4,
        ),
        DeviceSpec(
            name="v5e",
            device_kind="TPU v5 lite",
            topology="v5e:2x4",
            accelerator_type="v5litepod-8",
            clock_hz=1.5e9,
            peak_bf16_flops_per_s=197e12,
            hbm_bytes_per_s=819 * _GB,
            hbm_bytes=16 * _GIB,
            vmem_bytes=128 * _MIB,
            ici_link_bytes_per_s=50 * _GB,
            ici_wrap_length=16,
            source="https://cloud.google.com/tpu/docs/v5e; 197 TFLOP/s over four 128x128 MXUs is 1.5 GHz; 400 GB/s of "
            "bidirectional ICI a chip over 4 ports; a 2D torus at its full 16 x 16, a mesh below",
            matmul_cycles=4,
        ),
        DeviceSpec(
            name="v5p",
            device_kind="TPU v5",
            topology="v5p:2x2x1",
            accelerator_type="v5p-8",
            clock_hz=1.75e9,
            peak_bf16_flops_per_s=229.5e12,
            hbm_bytes_per_s=1382.5 * _GB,
            hbm_bytes=95 * _GIB,
            vmem_bytes=64 * _MIB,
            ici_link_bytes_per_s=100 * _GB,
            ici_wrap_length=4,
            source="https://cloud.google.com/tpu/docs/v5p, FLOP/s and HBM bandwidth halved: an op is split over two "
            "cores, and the schedule is that of one, for its half; 459 TFLOP/s over 2 x four 128x128 MXUs is "
            "1.75 GHz; 1200 GB/s of bidirectional ICI a chip over 6 ports",
            matmul_cycles=4,
            cores=2,
        ),
        DeviceSpec(
            name="v7x",
            device_kind="TPU7x",
            topology="tpu7x:2x2x1",
            accelerator_type="tpu7x-8",
            clock_hz=1.9e9,
            peak_bf16_flops_per_s=1153.5e12,
            hbm_bytes_per_s=3690 * _GB,
            hbm_bytes=96 * _GIB,
            vmem_bytes=64 * _MIB,
            ici_link_bytes_per_s=100 * _GB,
            ici_wrap_length=4,
            source="https://cloud.google.com/tpu/docs/tpu7x, halved: a chip's two TensorCores are two JAX devices; "
            "1153.5 TFLOP/s over two 256x256 MXUs is 2.2 GHz, the clock of p_state 7; by default it runs slower: "
            "1.9 GHz is fitted (docs/predictions.md); 1200 GB/s of bidirectional ICI a chip over 6 ports",
            matmul_cycles=4,
            devices_per_chip=2,
            p_states={3: 1.9e9, 7: 2.2e9},
        ),
    )
}

#: Generations that libtpu compiles for, and why no figure is given for them.
UNSUPPORTED = dict.fromkeys(
    ("v4", "TPU v4"),
    "libtpu compiles for its two TensorCores as two devices, and not as the one that share every op on the chip",
)


def by_name(name: str, given: str | None = None) -> DeviceSpec:
    """Return the spec for a short name ("v6e") or a JAX device kind ("TPU v6 lite").

    Args:
      given: what the user gave, as "topology='v6e-8'", for the error; None: name as device.

    Raises:
      ValueError: the device is not known, or not supported.
    """
    for spec in DEVICES.values():
        if name in (spec.name, spec.device_kind):
            return spec
    reason = f"not supported: {UNSUPPORTED[name]}; " if name in UNSUPPORTED else ""
    raise ValueError(f"{given or f'device={name!r}'}: {reason}expected one of {', '.join(DEVICES)}.")
