"""Compile a request's programs for chips that are not here, into JAX's compilation cache.

The cache's key is a hash of the program, the compiler's options, the versions of jaxlib and libtpu, and the topology:
a host that has those chips, with the same versions and this folder, finds them there. Else it compiles, as ever.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from offline_tpu import libtpu
from offline_tpu.machine.topology import parse_topology
from pipeline.checkpoints.loading import Checkpoint
from pipeline.model.denoise_step import EVERYTHING
from pipeline.model.sharding import check_quantization, resolve_plan
from pipeline.predict.presets import preset_steps
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest, Stage
from pipeline.stages.presets import settle_parallel
from pipeline.stages.programs import denoise_program, text_program, vae_programs
from splash_workbench.program import Program


def topology_devices(topology: str) -> list[jax.Device]:
    """Return chips that are not here. Raises RequestError for a name that there is not."""
    try:
        _, name = parse_topology(topology)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return libtpu.describe_topology(name).devices


def compile_ahead(programs: Iterable[tuple[str, Program]], say: Callable[[str], None]) -> None:
    """Compile `request_programs` for their devices.

    say: told of every program, before and after. Raises PipelineError where one does not compile.
    """
    for label, program in list(programs):  # all are made before one compiles: what refuses does so now
        say(f"{label}: compiling")
        start = time.perf_counter()
        try:
            with jax.set_mesh(program.mesh) if program.mesh is not None else contextlib.nullcontext():
                program.jitted.lower(*program.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            raise PipelineError(f"{label}: {' '.join(str(error).split())[:300]}") from error
        say(f"{label}: compiled in {time.perf_counter() - start:.0f} s")


def request_programs(
    request: GenerateRequest,
    stages: Sequence[Stage],
    parallel: ParallelOptions,
    devices: Sequence[jax.Device],
    configs: Mapping[str, Mapping[str, Any]],
    checkpoint: Checkpoint | None,
) -> Iterator[tuple[str, Program]]:
    """Yield (what it is, program) in the order in which a run needs them.

    devices: that they are for, here or not. configs: of the checkpoint's parts; checkpoint: None where it is not to be
    fetched, see `preset_steps`. Raises RequestError for a plan or preset that there is not.
    """
    steps = preset_steps(request, request.quality, configs, checkpoint, devices[0].device_kind)
    request = steps.request
    if devices[0].platform == "tpu" and request.attention.implementation is None:
        request = dataclasses.replace(
            request, attention=dataclasses.replace(request.attention, implementation="pallas_tpu")
        )
    choice, num_heads = settle_parallel(parallel, request), configs["transformer"]["num_attention_heads"]
    plan = resolve_plan(choice, len(devices), request.do_classifier_free_guidance, num_heads)
    check_quantization(request.quantization, plan)
    devices = devices[: plan.num_devices]
    if "text" in stages:
        yield "text", text_program(request, configs, devices)
    for work in dict.fromkeys((EVERYTHING, *steps.schedule.steps)) if "denoise" in stages else ():
        label = f"denoise, {plan}" + ("" if work == EVERYTHING else f", {work}")
        yield label, denoise_program(request, configs, plan, devices, steps.schedule.reuse, work)[0]
    if "vae" in stages:
        for index, (program, _) in enumerate(vae_programs(request, configs, devices), start=1):
            yield f"vae, program {index}", program
