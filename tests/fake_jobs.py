"""Jobs for worker processes that behave as real candidates do when things go well, or badly."""

import ctypes
import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path
from splash_workbench.trial_status import Status, TrialError, compile_error
from splash_workbench.workers import stages


def _passed(error: float = 0.004) -> dict[str, Any]:
    return {
        "implementation": "pallas_interpret",
        "q_seq_len": 467,
        "kv_seq_len": 563,
        "num_heads": 2,
        "block_sizes": "256/256/128",
        "rms_error": error,
        "max_row_error": error,
        "max_abs_error": error,
        "tolerance": 0.0156,
        "row_tolerance": 0.125,
    }


def _time_ms(blocks: dict[str, int]) -> float:
    """A bowl with its bottom at 384/512/128."""
    return (
        10 + abs(blocks["block_q"] - 384) / 128 + abs(blocks["block_kv"] - 512) / 64 + blocks["block_kv_compute"] / 128
    )


def bowl(payload: dict[str, Any]) -> dict[str, Any]:
    """An ok trial whose time depends on the block sizes; says in FAKE_JOBS_LOG that it ran.

    With FAKE_JOBS_HANG_AFTER=n it never ends where the log then has more than n lines.
    """
    if log := os.environ.get("FAKE_JOBS_LOG"):
        with Path(log).open("a") as file:
            file.write(json.dumps(payload["block_sizes"] or payload["options"]) + "\n")
        if len(Path(log).read_text().splitlines()) > int(os.environ.get("FAKE_JOBS_HANG_AFTER", sys.maxsize)):
            time.sleep(600)
    blocks = payload["block_sizes"] or {
        "block_q": 384,
        "block_kv": payload["options"]["block"],
        "block_kv_compute": 128,
    }
    return {"label": "predicted", "time_samples_ms": [_time_ms(blocks)], "numerics": _passed()}


def bowl_of_uneven_speed(payload: dict[str, Any]) -> dict[str, Any]:
    """`bowl`, now one and now another first done."""
    time.sleep(random.choice((0, 0, 0.2)))
    return bowl(payload)


def slow_bowl(payload: dict[str, Any]) -> dict[str, Any]:
    """`bowl`, a second later."""
    trial = bowl(payload)
    time.sleep(1)
    return trial


def bowl_that_is_lost_once(payload: dict[str, Any]) -> dict[str, Any]:
    """`bowl`, but the first job of all ends with the process that its worker belongs to, as if the machine was lost."""
    try:
        os.close(os.open(os.environ["FAKE_JOBS_LOST"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return bowl(payload)
    return lost(payload)


def lost(payload: dict[str, Any]) -> dict[str, Any]:
    """Kill the process that this worker belongs to, and so this one."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    raise AssertionError("not reached")


def on_no_node(payload: dict[str, Any]) -> dict[str, Any]:
    """Refuse every node."""
    raise UserError("this node is not fit")


def on_any_node(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


def by_block_q(payload: dict[str, Any]) -> dict[str, Any]:
    """A different fate for each block_q; the smaller the block, the faster it would have been."""
    block_q = payload["block_sizes"]["block_q"]
    fates = {
        128: wrong,
        256: out_of_memory,
        384: hang,
        512: abort,
        640: segfault,
        768: raises,
        896: exits,
    }
    return fates.get(block_q, bowl)(payload)


def wrong(payload: dict[str, Any]) -> dict[str, Any]:
    return {"status": Status.WRONG, "error": "rms_error=0.5", "numerics": _passed(error=0.5)}


def wrong_that_claims_to_be_ok(payload: dict[str, Any]) -> dict[str, Any]:
    return {"label": "predicted", "time_samples_ms": [0.001], "numerics": _passed(error=float("nan"))}


def out_of_memory(payload: dict[str, Any]) -> dict[str, Any]:
    raise TrialError(Status.OUT_OF_MEMORY, "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.")


def hang(payload: dict[str, Any]) -> dict[str, Any]:
    """With a child of its own, which must not outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if marker := os.environ.get("FAKE_JOBS_CHILD"):
        with atomic_path(Path(marker)) as path:  # killed any moment: it is there with the number, or not there
            path.write_text(str(child.pid))
    time.sleep(600)
    raise AssertionError("not reached")


def abort(payload: dict[str, Any]) -> dict[str, Any]:
    print("F0000 check failed: as libtpu says before it aborts", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
    raise AssertionError("not reached")


def refuses_a_flag(payload: dict[str, Any]) -> dict[str, Any]:
    """End as libtpu does where its arguments are wrong."""
    print(
        "I0000 starting\nERROR: Unknown command line flag 'xla_nonsense'\n    @     0x7f00  frame",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def short_of_something(payload: dict[str, Any]) -> dict[str, Any]:
    """Fail as on a machine that is short of what FAKE_JOBS_SHORT_OF says, else as `bowl`."""
    trouble = {
        "disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "memory": MemoryError(),
        "module": ModuleNotFoundError("No module named 'libtpu'"),
        "compiler's memory": compile_error(RuntimeError("RESOURCE_EXHAUSTED: Cannot allocate memory")),
    }
    match os.environ.get("FAKE_JOBS_SHORT_OF"):
        case None:
            return bowl(payload)
        case "all memory":
            os.kill(os.getpid(), signal.SIGKILL)
        case what:
            raise trouble[what]
    raise AssertionError("not reached")


def impossible(payload: dict[str, Any]) -> dict[str, Any]:
    """Return a time shorter than the kernel's."""
    return bowl(payload) | {"time_samples_ms": [0.0001], "kernel_time_ms": 0.005}


def segfault(payload: dict[str, Any]) -> dict[str, Any]:
    return {"time_samples_ms": [ctypes.string_at(0)]}


def raises(payload: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("first line\nmiddle\nlast line")


#: Where that is, as its error says.
RAISES_AT = f"fake_jobs.py:{raises.__code__.co_firstlineno + 1}"


def exits(payload: dict[str, Any]) -> dict[str, Any]:
    sys.exit(3)


EXITS_AT = f"fake_jobs.py:{exits.__code__.co_firstlineno + 1}"


def dumps_and_aborts(payload: dict[str, Any]) -> dict[str, Any]:
    """Leaves a dump as libtpu does, where the environment says."""
    dump_dir = Path(os.environ["FAKE_DUMP_DIR"])
    dump_dir.mkdir()
    (dump_dir / "bundles.txt").write_text("x" * 10_000)
    abort(payload)
    raise AssertionError("not reached")


def dumps(payload: dict[str, Any]) -> dict[str, Any]:
    """Leaves a dump, and fails if there is one."""
    dump_dir = Path(os.environ["FAKE_DUMP_DIR"])
    dump_dir.mkdir()
    (dump_dir / "bundles.txt").write_text("x" * 10_000)
    print("dumped")
    time.sleep(0.3)  # long enough to be seen
    return pid(payload)


_jobs_of_this_process: list[str] = []


def pid(payload: dict[str, Any]) -> dict[str, Any]:
    _jobs_of_this_process.append("pid")
    return {"pid": os.getpid()}


def aborts_in_a_used_process(payload: dict[str, Any]) -> dict[str, Any]:
    return abort(payload) if _jobs_of_this_process else pid(payload)


def wrong_kernel(payload: dict[str, Any]) -> dict[str, Any]:
    """The real check of the real kernel, whose output is then spoilt in one row."""
    import splash_attn
    from tuning.backends.interpret import check_candidate

    right = splash_attn.attention

    def spoilt(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return right(q, k, v, **options).at[0, 0, 17].multiply(1.5)

    splash_attn.attention = spoilt
    return check_candidate(payload)


def predicts(payload: dict[str, Any]) -> dict[str, Any]:
    return {"time_s": 0.012, "interval_s": [0.011, 0.013]}


def staged(payload: dict[str, Any]) -> dict[str, Any]:
    """Say two stages, and stay in the second until the file of the payload is there."""
    stages.enter("compile")
    stages.enter("check")
    while not Path(payload["until"]).exists():
        time.sleep(0.02)
    return {"done": True}


def forks(payload: dict[str, Any]) -> dict[str, Any]:
    """Fork a process that says a stage, fails and comes back to the worker's loop."""
    if child := os.fork():
        os.waitpid(child, 0)
        return {"from": "the job"}
    stages.enter("forked")
    raise ValueError("of the forked process")


def answers_twice(payload: dict[str, Any]) -> dict[str, Any]:
    for found in gc.get_objects():
        if isinstance(found, Connection):
            found.send_bytes(json.dumps({"status": "ok", "number": 0, "from": "nobody"}).encode())
    return {}


def says_what_is_no_text(payload: dict[str, Any]) -> dict[str, Any]:
    raise TrialError(Status.WRONG, "a file's name: \udcff")
