"""Weights that are read by rows: each byte once, the right values, and what several processes read."""

import dataclasses
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from helpers import PLENTY_S, environment_with_repo, virtual_devices
from pipeline.model import placement
from pipeline.model.placement import Stacked, place_all, read_whole
from pipeline.model.weights import _HalvedPairs
from rows import HostRows


def _one_device() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), "model"), PartitionSpec())


@pytest.mark.parametrize("divisible", [True, False])
def test_a_weight_is_read_once_and_placed(divisible, rng, monkeypatch):
    monkeypatch.setattr(placement, "_PIECE_BYTES", 7 * 11 * 4)
    monkeypatch.setattr(placement, "_AHEAD_BYTES", 1000)
    alone, *layers = (HostRows(rng.normal(size=(29, 11)).astype(np.float32), divisible) for _ in range(4))
    sharding = _one_device()
    placed = dict(place_all([("alone", alone, sharding), ("stack", Stacked(layers), sharding)]))
    np.testing.assert_array_equal(placed["alone"], alone.values)
    np.testing.assert_array_equal(placed["stack"], [layer.values for layer in layers])
    assert all(each.read_bytes == each.values.nbytes for each in (alone, *layers))


@dataclasses.dataclass
class _Broken(HostRows):
    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        raise OSError("gone")


def test_a_failed_read_ends_the_loading(rng):
    values = rng.normal(size=(3, 2))
    with pytest.raises(OSError, match="gone"):
        dict(place_all((str(i), (HostRows, _Broken)[i == 2](values), _one_device()) for i in range(5)))


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (8, 16), (3, 13), (23, 24)])
def test_pairs_are_taken_apart_in_whole_heads(start, stop, rng):
    stock = rng.normal(size=(24, 5)).astype(np.float32)
    heads = stock.reshape(3, 8, 5)
    expected = np.concatenate([heads[:, ::2], heads[:, 1::2]], axis=1).reshape(24, 5)
    weight = _HalvedPairs(HostRows(stock), head_dim=8)
    np.testing.assert_array_equal(read_whole(weight), expected)
    out = np.empty((stop - start, 5), np.float32)
    weight.read(start, stop, out)
    np.testing.assert_array_equal(out, expected[start:stop])


_SCRIPT = """
import json, sys
path, address, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
import jax
jax.distributed.initialize(address, 2, process)
import numpy as np, torch
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from pipeline.checkpoints.stored import open_stored, reads_so_far
from pipeline.model.placement import Stacked, place_all, to_host
from pipeline.model.sharding import ParallelPlan

stock, read = load_file(path), {}
for plan, splits in (
    (ParallelPlan("ulysses", 2, 2), {"whole": (), "rows": ("model",)}),
    (ParallelPlan("megatron", 1, 4), {"rows of hosts": ("model",), "columns of hosts": (None, "model")}),
    (ParallelPlan("megatron", 2, 2), {"columns": (None, "model")}),
):
    mesh = plan.mesh(jax.devices())
    for split, spec in splits.items():
        with open_stored(Path(path), "") as file:
            large, small = (file.weight(name, torch.float32) for name in ("large", "small"))
            alone, stacked = NamedSharding(mesh, PartitionSpec(*spec)), NamedSharding(mesh, PartitionSpec(None, *spec))
            before = reads_so_far().read_bytes
            for name, array in place_all([("alone", large, alone), ("stacked", Stacked([large, large]), stacked)]):
                assert array.sharding.is_equivalent_to(alone if name == "alone" else stacked, array.ndim)
                expected = stock["large"] if name == "alone" else np.stack([stock["large"]] * 2)
                assert to_host(array).tobytes() == expected.tobytes(), (split, name)
            read[split] = (reads_so_far().read_bytes - before) / 3 / stock["large"].nbytes
            ((_, array),) = place_all([("small", small, NamedSharding(mesh, PartitionSpec()))])
            assert to_host(array).tobytes() == stock["small"].tobytes()
print(json.dumps(read))
"""


@pytest.mark.slow("30 s")  # runs/test_hosts.py has two processes that read a part each and make the right video
@pytest.mark.compile
def test_two_processes_read_a_half_each_and_have_the_same_bits(tmp_path, shared_programs, rng):
    """Of arrays that are whole on each device, or split by what both processes have, or by what each has."""
    large = rng.normal(size=(1024, 264)).astype(np.float32)
    large[::3] = -0.0  # sums of parts would make it 0
    save_file({"large": large, "small": large[:5]}, tmp_path / "x.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {**shared_programs, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": virtual_devices(2)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(tmp_path / "x.safetensors"), address, str(index)],
            env=environment_with_repo() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=PLENTY_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for shown, _ in outputs:
        read = json.loads(shown.splitlines()[-1])
        assert read == dict.fromkeys(("whole", "rows", "rows of hosts", "columns of hosts", "columns"), 0.5)
