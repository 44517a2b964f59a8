"""Connect to a Ray cluster, and say what it has room for."""

import contextlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from splash_workbench.engines.settings import EngineSettings
from splash_workbench.errors import UserError

_CONNECT_TIMEOUT_S = 10.0
_HOW_TO_START = "start one with `ray start --head`, or give engine.address=HOST:PORT"


class Cluster:
    """The cluster that this process is connected to.

    ray: the module, which is imported only where an engine needs it.
    """

    def __init__(self, ray: Any, settings: EngineSettings) -> None:
        self.ray, self.settings = ray, settings

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that live, as `ray.nodes` has them."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    def needs(self, memory_bytes: int = 0) -> dict[str, float]:
        """Return what one candidate or slice takes of a node, by Ray's names."""
        memory = {"memory": float(memory_bytes)} if memory_bytes else {}
        return {"CPU": self.settings.num_cpus, **self.settings.resources, **memory}

    def options(self, memory_bytes: int = 0) -> dict[str, Any]:
        """Return the same as options of a Ray task or actor."""
        memory = {"memory": memory_bytes} if memory_bytes else {}
        return {"num_cpus": self.settings.num_cpus, "resources": dict(self.settings.resources) or None, **memory}

    def room(self, memory_bytes: int = 0) -> int:
        """Return how many candidates or slices all nodes hold, with that much memory each."""
        needs = self.needs(memory_bytes)
        return sum(
            math.floor(min(node["Resources"].get(name, 0.0) / amount for name, amount in needs.items()))
            for node in self.nodes()
        )

    def require_room(self, memory_bytes: int = 0) -> int:
        """Return `room`. Raises UserError where there is none."""
        if room := self.room(memory_bytes):
            return room
        needs = ", ".join(f"{name} {amount:g}" for name, amount in self.needs(memory_bytes).items())
        raise UserError(f"engine=ray: none of {self.line()} has {needs}; start nodes that have, or ask for less.")

    def line(self) -> str:
        """Return the size of the cluster in words."""
        nodes = self.nodes()
        cpus = sum(node["Resources"].get("CPU", 0.0) for node in nodes)
        return f"{len(nodes)} Ray node{'s' * (len(nodes) != 1)} with {cpus:g} CPUs"


@contextlib.contextmanager
def connected(settings: EngineSettings, *, show_output: bool = False) -> Iterator[Cluster]:
    """Connect to the cluster in the block. What it runs for this process ends with it, however that is.

    show_output: print what the nodes' processes print, too. Raises UserError where Ray or the cluster is not there.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"engine=ray: Ray is not installed ({error}); install the extra cluster.") from error
    _require_answer(settings.address)
    with _own_signals():
        try:
            ray.init(address=settings.address, logging_level=logging.ERROR, log_to_driver=show_output)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            where = f"engine.address={settings.address}"
            raise UserError(f"{where}: no Ray cluster ({reason}); {_HOW_TO_START}.") from error
    try:
        yield Cluster(ray, settings)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise UserError where nothing listens at HOST:PORT: Ray itself would try for a minute, and print much."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host:
        return
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"engine.address={address}: expected HOST:PORT, auto or local.")
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"engine.address={address}: nothing answers there ({error}); {_HOW_TO_START}.") from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers: `ray.init` sets one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
