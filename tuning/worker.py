"""The other end of `tuning.evaluate.run_job`: one job in this process, its result in a file.

    python -m tuning.worker REQUEST.json RESULT.json

The request names a function, "package.module:function"; it takes the request's payload and returns a dict.
"""

import importlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tuning.status import Status, TrialError

#: Past the parent's own limit, for the case that the parent is gone and this process no longer runs Python code.
_ALARM_GRACE_S = 30
_ERROR_CHARACTERS = 1000


def main(request_path: str, result_path: str) -> NoReturn:
    request = json.loads(Path(request_path).read_text())
    signal.alarm(math.ceil(request["timeout_s"]) + _ALARM_GRACE_S)
    threading.Thread(target=_die_with_parent, args=(Path(request_path).parent,), daemon=True).start()
    try:
        result = {"status": "ok"} | _resolve(request["target"])(request["payload"])
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, TrialError):
            result = {"status": error.status, "error": " ".join(str(error).split())[:_ERROR_CHARACTERS]}
        else:
            result = {"status": Status.CRASHED, "error": _one_line(error)}
    temporary = Path(result_path).with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(result_path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the result is written: what a compiler does wrong while it is torn down no longer matters


def _one_line(error: Exception) -> str:
    """The first and the last line: the last has the cause where one error wraps another. The log has the rest."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return f"{type(error).__name__}: {text}"[:_ERROR_CHARACTERS]


def _resolve(target: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _die_with_parent(work_dir: Path) -> None:
    """The parent holds the other end of stdin: it closes when the parent dies, by kill -9 too."""
    os.read(sys.stdin.fileno(), 1)
    shutil.rmtree(work_dir, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
