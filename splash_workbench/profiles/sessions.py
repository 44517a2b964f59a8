"""Keeps profiles on disk: where they go, what is said about them, and how TensorBoard shows them.

A run has a session for each of its parts (a stage of the pipeline, or none), and each repeat of the run has its own:
`<logdir>/plugins/profile/<run>[-<part>][.<repeat>]/<host>.xplane.pb`. `session.json` beside it is written last and says
what ran.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import re
import shlex
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from splash_workbench import provenance
from splash_workbench.errors import UserError
from splash_workbench.files import write_json
from splash_workbench.profiles import profiler
from splash_workbench.profiles.reader import SUFFIX
from splash_workbench.records.base import utc_now
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.trial_status import Label

logger = logging.getLogger(__name__)

SESSION_FILE = "session.json"
PORT = 6006
#: A change in one of these can change what a profile says.
_SOURCES = ("splash_workbench/profiles/*.py",)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclasses.dataclass(frozen=True)
class Session:
    """Description of a session.

    Attributes:
      part: a stage of the pipeline; "" for a run of one part.
      repeat: from 1; repeats of a run are taken together as samples of the same thing.
      made_by: of a prediction, what made it: "libtpu 0.0.52".
      config: what ran: a request, or a workload with block sizes.
    """

    run: str
    part: str
    repeat: int
    label: Label
    device: str
    made_by: str | None
    config: dict[str, Any]
    environment: provenance.Environment
    created_at: str = dataclasses.field(default_factory=utc_now)

    @property
    def name(self) -> str:
        """Return the folder's name, and what TensorBoard calls it."""
        part = f"-{self.part}" if self.part else ""
        return f"{self.run}{part}" + (f".{self.repeat}" if self.repeat > 1 else "")


class Recorder:
    """Records the parts of the next repeat of a run on this device. Raises as `check_name` and `check_profiler`."""

    def __init__(self, logdir: Path, run: str, config: Mapping[str, Any]) -> None:
        self.logdir, self.run, self.config = logdir, check_name(run), config
        profiler.check_profiler()
        repeats = [session.repeat for _, session in sessions(logdir) if session.run == run]
        self.repeat = max(repeats, default=0) + 1

    @contextlib.contextmanager
    def record(self, part: str = "") -> Iterator[Session]:
        """Profile the block, which should compile nothing. One that fails leaves a session without SESSION_FILE.

        A trace that cannot be written is a warning.
        """
        session = Session(
            run=self.run,
            part=part,
            repeat=self.repeat,
            label=Label.MEASURED,
            device=jax.devices()[0].device_kind,
            made_by=None,
            config=dict(self.config),
            environment=provenance.capture(_SOURCES),
        )
        options = jax.profiler.ProfileOptions()
        options.session_id = session.name
        options.python_tracer_level = 0  # every call of Python as an event would slow down what is measured
        if jax.process_count() == 1:  # what a run that failed left, and TensorBoard made of it
            shutil.rmtree(profile_dir(self.logdir) / session.name, ignore_errors=True)
        ended = False
        try:
            with profiler.trace(self.logdir, options):
                yield session
                ended = True
            if jax.process_index() == 0:
                write_session(self.logdir, session)
        except (OSError, RuntimeError) as error:
            if not ended:
                raise
            # What was profiled has been computed, and matters more.
            logger.warning("logdir=%s: the trace of %s was not written (%s)", self.logdir, session.name, error)


def how_to_look(logdir: Path, run: str) -> tuple[str, ...]:
    """Return lines that tell a user where the traces of a run are and how to open them."""
    command = f"  {tensorboard_command(logdir)}"
    if importlib.util.find_spec("tensorboard") is None:
        command += "   (pip install 'cogvideox-splash[trace]')"
    return (f"traces: {profile_dir(logdir) / run}*", command)


def profile_dir(logdir: Path) -> Path:
    """Return where TensorBoard's profile plugin looks for sessions."""
    return logdir / "plugins" / "profile"


def write_session(logdir: Path, session: Session, space: Any = None) -> Path:
    """Write a session's description, after its XSpace where one is given. Returns the session's folder."""
    folder = profile_dir(logdir) / session.name
    if space is not None:
        shutil.rmtree(folder, ignore_errors=True)  # with what TensorBoard keeps there of an older one
        folder.mkdir(parents=True)
        (folder / f"{space.hostnames[0]}{SUFFIX}").write_bytes(space.SerializeToString())
    write_json(folder / SESSION_FILE, encode(session))
    return folder


def sessions(logdir: Path) -> list[tuple[Path, Session]]:
    """Return the sessions with a SESSION_FILE by their names. Raises UserError where such a file cannot be read."""
    found = []
    for path in sorted(profile_dir(logdir).glob(f"*/{SESSION_FILE}")):
        found.append((path.parent, read_session(path)))
    return found


def read_session(path: Path) -> Session:
    """Return what a SESSION_FILE says. Raises UserError where it cannot be read."""
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")), Session)
    except ValueError as error:
        raise UserError(f"{path}: not the description of a session ({error}); remove its folder.") from error


def check_name(name: str) -> str:
    """Return the name of a run. Raises UserError where it cannot be a folder's and part of a link."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r}: expected a run's name of letters, digits and _ . + -, e.g. 'xla-160x96x9'.")
    return name


def safe_name(text: str) -> str:
    """Return a text as part of a run's name."""
    return _UNSAFE.sub("-", text).strip("-.+")


def require_tensorboard(what_for: str) -> None:
    """Raise UserError where the optional packages are missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"{what_for}: needs TensorBoard, which is not installed; pip install 'cogvideox-splash[trace]', "
            "or pip install -e '.[trace]' in a checkout."
        )


def tensorboard_command(logdir: Path, port: int = PORT) -> str:
    """Return the command that shows a logdir, to this machine only."""
    return f"tensorboard --logdir {shlex.quote(str(logdir))} --host 127.0.0.1 --port {port}"


def link(session: str, tool: str, hosts: Sequence[str], *, base: str | None = None, port: int = PORT) -> str:
    """Return the address of a page of TensorBoard's profile tab.

    tool: "overview_page", "trace_viewer@", "op_profile" ...; hosts: of the session, one or several side by side; base:
    a session to show differences to, where the tool can.
    """
    query = {"run": session, "tag": tool, "hosts" if len(hosts) > 1 else "host": ",".join(hosts)}
    if base is not None:
        query["base_session_id"] = base
    return f"http://127.0.0.1:{port}/?{urllib.parse.urlencode(query, safe='@,')}#profile"
