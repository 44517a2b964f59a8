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
from typing import Any

from tuning.records import Status, TrialError

#: Past the parent's own limit, for the case that the parent is gone and this process no longer runs Python code.
_ALARM_GRACE_S = 30


def main(request_path: str, result_path: str) -> int:
    request = json.loads(Path(request_path).read_text())
    signal.alarm(math.ceil(request["timeout_s"]) + _ALARM_GRACE_S)
    threading.Thread(target=_die_with_parent, args=(Path(request_path).parent,), daemon=True).start()
    try:
        result = {"status": "ok"} | _resolve(request["target"])(request["payload"])
    except Exception as error:  # whatever a candidate raises is its result, and goes into its record
        traceback.print_exc()
        status = error.status if isinstance(error, TrialError) else Status.CRASHED
        result = {"status": status, "error": f"{type(error).__name__}: {error}"}
    temporary = Path(result_path).with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(result_path)
    return 0


def _resolve(target: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _die_with_parent(work_dir: Path) -> None:
    """The parent holds the other end of stdin: it closes when the parent dies, by kill -9 too."""
    sys.stdin.buffer.read()
    shutil.rmtree(work_dir, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
