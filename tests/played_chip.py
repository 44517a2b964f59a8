"""Chips that are played: a TPU v6e whose programs take planted times, and what can go wrong with one."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import jax

from splash_attn.api import Implementation
from splash_workbench.profiles.xla_pb2 import XSpace
from splash_workbench.program import Program
from tuning.selfcheck.chip import Chip, Prepared

HBM_BYTES = 32 * 2**30
#: What every program takes by the profile, and the kernel in it.
TIME_MS, KERNEL_MS = 14.0, 13.0
#: Larger programs are not really compiled and run.
_MOST_ELEMENTS = 10**6


class PlayedChip(Chip):
    """Small programs run on the CPU; the times of all are planted in a profile as a TPU writes it."""

    def __init__(self, fault: Callable[[], Any] | None = None, modules: str = "XLA Modules") -> None:
        super().__init__(jax.devices())
        self.platform, self.device_kind = "tpu", "TPU v6 lite"
        self._fault, self._modules = fault, modules

    @property
    def checked(self) -> Implementation:
        return "pallas_interpret"

    timed = checked

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": HBM_BYTES, "bytes_in_use": 2**30}

    def prepare(self, program: Program) -> Prepared:
        if self._fault is not None:
            self._fault()
        if sum(leaf.size for leaf in jax.tree.leaves(program.arguments)) < _MOST_ELEMENTS:
            return super().prepare(program)
        return Prepared(program, list(program.arguments), lambda *arguments: {0: (), 1: ()})

    def profile(self, run: Callable[[], object], count: int) -> Any:
        space = XSpace()
        plane = space.planes.add(name="/device:TPU:0")
        spans = {"XLA Ops": ("splash_attention.1", KERNEL_MS), self._modules: ("jit_program(1)", TIME_MS)}
        for index, (title, (name, time_ms)) in enumerate(spans.items(), start=1):
            plane.event_metadata[index].id = index
            plane.event_metadata[index].name = name
            line = plane.lines.add(name=title)
            for run_index in range(count):
                start_ps = run_index * int(2 * TIME_MS * 1e9)
                line.events.add(metadata_id=index, offset_ps=start_ps, duration_ps=int(time_ms * 1e9))
        return space


def healthy() -> Chip:
    return PlayedChip()


def without_events() -> Chip:
    """Its profiles have no runs of programs."""
    return PlayedChip(modules="Steps")


def crashing() -> Chip:
    return PlayedChip(lambda: os.kill(os.getpid(), signal.SIGABRT))


def hanging() -> Chip:
    return PlayedChip(lambda: time.sleep(600))


def full() -> Chip:
    def fault() -> None:
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm, {os.path.abspath('dump')}/buffers.txt"
        )

    return PlayedChip(fault)


def wrong() -> Chip:
    """Its kernel spoils one row of each result."""
    import splash_attn

    right = splash_attn.attention
    splash_attn.attention = lambda *arrays, **options: right(*arrays, **options).at[..., -1, :].multiply(1.5)
    return PlayedChip()


def absent() -> Chip:
    raise RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE: the chips are in use by another process")


@dataclasses.dataclass(frozen=True)
class ModelProgram:
    program: Program
    arguments: dict[str, Any]
    config: dict[str, Any]


def stage_program(model: str, stage: str, devices: Any, hbm_bytes: int | None) -> ModelProgram:
    """In place of `pipeline.stages.programs.model_program`, which needs libraries that take seconds to import."""
    program = Program(jax.jit(lambda x: (x + 1,)), (jax.ShapeDtypeStruct((8,), "float32"),), carried={0: 0})
    return ModelProgram(program, {"checkpoint": model}, {"num_devices": len(devices)})
