"""The worker's job that predicts the time of a measured row."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

import offline_tpu
from offline_tpu import libtpu
from offline_tpu.dump import UNKNOWN_TRIPS
from offline_tpu.machine import devices
from offline_tpu.schedule.execute import RUN_IN_PART
from splash_workbench.records import jsonl
from splash_workbench.trial_status import compile_error
from tuning.validate.programs import CannotMakeError, Program, forms
from tuning.validate.record import RowPrediction, has_memory, memory_difference
from tuning.validate.rows import COLLECTIVES, MeasuredRow


def predict_row(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict a row's time. Payload: `call`, see MeasuredRow.call, `device`, a known name, and `kept`, see
    `offline_tpu.predict` (None: nothing is kept).

    Of the forms in which compilers have made the program, the one counts whose memory is nearest to the reported.

    Returns fields of a RowPrediction, or why the row's program cannot be made, as `unmade`.
    """
    device = devices.by_name(payload["device"])
    row = MeasuredRow(id="", source="", times_ms=(), **payload["call"])
    libtpu.describe_topology(device.topology)  # its errors are not the row's
    try:
        programs = forms(row, device)
    except CannotMakeError as error:
        return {"unmade": str(error)}
    kept = Path(payload["kept"]) if payload["kept"] else None
    one = len(programs) == 1
    found: list[_Form] = []
    failures: list[Exception] = []
    for number, program in enumerate(programs):
        path = kept if one or not kept else kept.with_name(f"{number}-{kept.name}")
        try:
            found.append(_Form(program, _predict(program, device, path), path))
        except offline_tpu.UnknownDumpFormatError:
            raise
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            failures.append(error)
            continue
        if has_memory(row.peak_memory_mb, found[-1].peak_memory_mb):
            break
    if not found:
        raise compile_error(failures[-1]) from failures[-1]
    form = min(found, key=lambda form: memory_difference(row.peak_memory_mb, form.peak_memory_mb))
    if kept and form.kept and not one:
        shutil.copyfile(form.kept, kept)  # where the fit looks for it
    unresolved = form.prediction.unresolved
    if unknown := [text for text in unresolved if text.endswith((UNKNOWN_TRIPS, RUN_IN_PART))]:
        return {"unmade": unknown[0]}
    timed = form.prediction
    if row.op in COLLECTIVES:
        if not timed.collectives:
            return {"unmade": "the compiler makes no collective of it"}
        time_s = sum(op.time_s for op in timed.collectives)
        timed = dataclasses.replace(timed, ops=timed.collectives, time_s=time_s)
    return jsonl.encode(RowPrediction.of(timed, form.program.form))


@dataclasses.dataclass(frozen=True)
class _Form:
    program: Program
    prediction: offline_tpu.Prediction
    kept: Path | None

    @property
    def peak_memory_mb(self) -> float:
        return self.prediction.peak_live_bytes / 1e6


def _predict(program: Program, device: devices.DeviceSpec, kept: Path | None) -> offline_tpu.Prediction:
    return offline_tpu.predict(
        program.fn,
        *program.args,
        device=None if program.topology else device,
        topology=program.topology,
        mesh=program.mesh,
        compiler_options=program.compiler_options,
        kept=kept,
    )
