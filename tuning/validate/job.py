"""The worker's job that predicts the time of a measured row."""

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
from tuning.validate.programs import CannotMakeError, build
from tuning.validate.record import RowPrediction
from tuning.validate.rows import MeasuredRow


def predict_row(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict a row's time. Payload: `call`, see MeasuredRow.call, `device`, a known name, and `kept`, see
    `offline_tpu.predict` (None: nothing is kept).

    Returns fields of a RowPrediction, or why the row's program cannot be made, as `unmade`.
    """
    device = devices.by_name(payload["device"])
    row = MeasuredRow(id="", source="", times_ms=(), **payload["call"])
    libtpu.describe_topology(device.topology)  # its errors are not the row's
    try:
        program = build(row, device)
    except CannotMakeError as error:
        return {"unmade": str(error)}
    try:
        prediction = offline_tpu.predict(
            program.fn,
            *program.args,
            device=None if program.topology else device,
            topology=program.topology,
            mesh=program.mesh,
            compiler_options=program.compiler_options,
            kept=Path(payload["kept"]) if payload["kept"] else None,
        )
    except offline_tpu.UnknownDumpFormatError:
        raise
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    if unknown := [text for text in prediction.unresolved if text.endswith((UNKNOWN_TRIPS, RUN_IN_PART))]:
        return {"unmade": unknown[0]}
    return jsonl.encode(RowPrediction.of(prediction))
