"""Ray nodes as processes of this machine."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from helpers import environment_with_repo, wait_until_dead

#: Bytes of each node's object store: little is kept there.
_STORE_BYTES = 80 * 2**20


class Nodes:
    """A cluster whose head runs no tasks; address: HOST:PORT."""

    def __init__(self, cluster: Any) -> None:
        self._cluster, self._nodes, self.address = cluster, [], cluster.address

    def add(self, num_cpus: int = 1) -> None:
        """Start a node, and wait until it is there."""
        self._nodes.append(self._cluster.add_node(num_cpus=num_cpus, object_store_memory=_STORE_BYTES))

    def kill_9(self, index: int = 0) -> None:
        """Kill a node as a machine that is switched off: its daemon, and so all that it runs."""
        (raylet,) = self._nodes.pop(index).all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        raylet.process.wait()
        wait_until_dead(raylet.process.pid)


@contextlib.contextmanager
def ray_nodes(*num_cpus: int, **variables: str) -> Iterator[Nodes]:
    """Start a head and a node for each number of CPUs, with these environment variables; skip without Ray."""
    pytest.importorskip("ray", reason="Ray, of the extra cluster, is not installed")
    from ray.cluster_utils import Cluster

    # A short path: sockets have theirs in it. pytest's own temporary folder can be too deep.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        for name, value in (environment_with_repo() | variables | {"RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = Nodes(cluster)
            for count in num_cpus:
                nodes.add(count)
            yield nodes
        finally:
            cluster.shutdown()
