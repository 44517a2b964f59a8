"""Run one job after another in this process, for `splash_workbench.workers.pool`.

    python -m splash_workbench.workers.worker FOLDER CONNECTION

A request names a function, "package.module:function"; it takes the request's payload and returns a dict.
"""

import contextlib
import gc
import json
import math
import os
import pkgutil
import queue
import shutil
import signal
import sys
import sysconfig
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from splash_workbench.errors import OF_USERS_CODE, innermost_line
from splash_workbench.trial_status import Status, TrialError
from splash_workbench.workers import stages

#: Past the parent's own limit, for the case that the parent is gone and this process no longer runs Python code.
_ALARM_GRACE_S = 30
_ERROR_CHARACTERS = 1000
#: Where memory is short, Linux ends this process and not the sweep.
_OOM_SCORE = 500


def main(folder: str, descriptor: str) -> NoReturn:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    os.set_inheritable(int(descriptor), False)  # what a job starts must not keep the connection open
    connection = Connection(int(descriptor))
    own_pid = os.getpid()

    def send(reply: dict[str, Any]) -> None:
        if os.getpid() == own_pid:  # a process that a job forked comes here, too, and answers nothing
            connection.send_bytes(json.dumps(reply).encode())

    stages.listen(lambda stage: send({"stage": stage}))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests, Path(folder)), daemon=True).start()
    while True:
        request = requests.get()
        signal.alarm(math.ceil(request["timeout_s"]) + _ALARM_GRACE_S)
        reply = _run(request) | {"number": request["number"]}
        if os.getpid() != own_pid:
            os._exit(0)
        signal.alarm(0)
        _forget(Path(folder))
        sys.stdout.flush()
        sys.stderr.flush()
        send(reply)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"status": Status.OK} | pkgutil.resolve_name(request["target"])(request["payload"])
    except TrialError as error:
        traceback.print_exc()
        return {"status": error.status, "error": " ".join(str(error).split())[:_ERROR_CHARACTERS]}
    except OF_USERS_CODE as error:
        traceback.print_exc()
        return {"status": Status.CRASHED, "error": _one_line(error)}


def _forget(folder: Path) -> None:
    """Drop compiled programs, and folders in the worker's own: they would add up from job to job."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    """Return the first line, and the last: that has the cause where one error wraps another. The log has the rest."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return f"{type(error).__name__}{_place(error)}: {text}"[:_ERROR_CHARACTERS]


def _place(error: BaseException) -> str:
    """Return " at NAME:LINE" of the innermost line that is of no installed package; nothing where there is none."""
    installed = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "purelib", "platlib"))
    line = innermost_line(error, lambda filename: not filename.startswith(installed))
    return f" at {line}" if line else ""


def _receive(connection: Connection, requests: queue.SimpleQueue[dict[str, Any]], folder: Path) -> None:
    """Hand requests on. The connection closes when the parent dies, by kill -9 too: then all ends here."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(json.loads(connection.recv_bytes()))
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
