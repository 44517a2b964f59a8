"""The transformer's weights from a disk: the loader beside plain reads of the same files, in one run.

    python benchmarks/load.py [--layers 16] [--rounds 3] [--folder FOLDER]

makes a checkpoint of the shapes of CogVideoX1.5-5B (random bfloat16, 0.26 GB a layer), and deletes it in the end.
Before each reading the files are dropped from the page cache; each is done by a process of its own, in turn:

- disk: eight threads read 16 MiB at a time, each into the same memory again and again.
- memory: the same into memory that keeps all of it, as weights are kept.
- loader: `place_transformer` onto eight simulated devices that hold a part each; their arrays, which are in the host's
  memory here, are there once.

Each process has first written to as much memory as the weights take, and freed it: a virtual machine gets memory from
its host where it is used for the first time, which can take longer than reading the weights. `--new-memory` leaves it
out.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_DEVICES, _THREADS, _PIECE_BYTES = 8, 8, 2**24
_SHARD_BYTES = 10**9


def make_checkpoint(folder: Path, num_layers: int) -> int:
    """Write transformer/ with random weights. Returns their bytes. Raises SystemExit where they do not fit the disk."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from pipeline.checkpoints.loading import build_module
    from pipeline.checkpoints.published import COGVIDEOX_1_5_5B
    from pipeline.checkpoints.weight_files import weight_shapes

    config = {**COGVIDEOX_1_5_5B["transformer"], "num_layers": num_layers}
    shapes = weight_shapes(build_module("transformer", config, torch.bfloat16))
    nbytes = 2 * sum(shape.numel() for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * nbytes:
        raise SystemExit(f"folder={folder}: {free / 1e9:.1f} GB free, {1.1 * nbytes / 1e9:.1f} needed; fewer --layers")
    part, rng = folder / "transformer", np.random.default_rng(0)
    part.mkdir()
    (part / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}

    def write(names: list[str]) -> None:
        file = f"diffusion_pytorch_model-{len(set(weight_map.values())) + 1:05}.safetensors"
        tensors = {}
        for name in names:
            bits = rng.integers(0, 0x3F80, shapes[name], np.uint16)  # of numbers from 0 to 1
            tensors[name] = torch.from_numpy(bits).view(torch.bfloat16)
        save_file(tensors, part / file)
        weight_map.update(dict.fromkeys(names, file))

    names: list[str] = []
    for name in shapes:
        names.append(name)
        if 2 * sum(shapes[each].numel() for each in names) > _SHARD_BYTES:
            write(names)
            names = []
    write(names)
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return nbytes


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a checkpoint."""
    return sorted((folder / "transformer").glob("*.safetensors"))


def drop_from_page_cache(folder: Path) -> None:
    """Have the next reading go to the disk, as far as this can be told to the system."""
    for path in weight_files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def prepare(folder: Path, new_memory: bool) -> None:
    """Have the next reading go to the disk, and find memory that is free and in use by this machine already."""
    import numpy as np

    if not new_memory:
        np.empty(sum(path.stat().st_size for path in weight_files(folder)), np.uint8)[::4096] = 1
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    drop_from_page_cache(folder)


def peak_bytes() -> int:
    """Return the most memory that this process has had, since `prepare`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def read_plain(folder: Path, new_memory: bool, keep: bool) -> dict[str, float]:
    """Read all files by several threads. keep: each piece in memory of its own; else all into the same."""
    import numpy as np

    descriptors = {os.open(path, os.O_RDONLY): path.stat().st_size for path in weight_files(folder)}
    pieces = [(file, offset) for file, size in descriptors.items() for offset in range(0, size, _PIECE_BYTES)]
    prepare(folder, new_memory)

    def read(number: int) -> int:
        mine = pieces[number::_THREADS]
        room = np.empty((len(mine) if keep else 1, _PIECE_BYTES), np.uint8)
        return sum(os.preadv(file, [room[index % len(room)].data], at) for index, (file, at) in enumerate(mine))

    start, cpu_start = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(_THREADS) as pool:
        assert sum(pool.map(read, range(_THREADS))) == sum(descriptors.values())
    return {"time_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}


def load(folder: Path, new_memory: bool) -> dict[str, float]:
    """Load the transformer onto simulated devices, and check one of its weights."""
    import jax
    import numpy as np
    import torch
    from safetensors import safe_open

    from pipeline.checkpoints.loading import Checkpoint, import_libraries
    from pipeline.checkpoints.placed import place_transformer
    from pipeline.model.sharding import ParallelPlan
    from pipeline.model.torchax_bridge import torch_to_numpy

    import_libraries()
    plan = ParallelPlan("ulysses", dp=1, model=_DEVICES, weights="sharded")
    mesh = plan.mesh(jax.devices())
    prepare(folder, new_memory)
    before = peak_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    placed = place_transformer(Checkpoint("made for this", folder), torch.bfloat16, plan, mesh)
    found = {"time_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    found |= {"peak_bytes": peak_bytes(), "before_bytes": before}
    layer, name = 1, "ff.net.0.proj.weight"
    actual = np.asarray(placed.weights[f"transformer_blocks.{name}"][layer])
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            key = f"transformer_blocks.{layer}.{name}"
            if key in file.keys():  # noqa: SIM118 (not a dict)
                np.testing.assert_array_equal(actual, torch_to_numpy(file.get_tensor(key)))
                return found
    raise AssertionError(f"{key} is in no file")


READINGS = {
    "disk": functools.partial(read_plain, keep=False),
    "memory": functools.partial(read_plain, keep=True),
    "loader": load,
}


def in_own_process(what: str, folder: Path, new_memory: bool) -> dict[str, float]:
    """Return what one of READINGS returns in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={_DEVICES}"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, "--only", what, "--folder", str(folder)]
    command += ["--new-memory"] if new_memory else []
    return json.loads(subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of the transformer; the model has 42")
    parser.add_argument("--rounds", type=int, default=3, help="readings of each kind")
    parser.add_argument("--folder", type=Path, help="on the disk to read from; by default that of temporary files")
    parser.add_argument("--new-memory", action="store_true", help="memory is not used before it is timed")
    parser.add_argument("--only", choices=READINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(READINGS[options.only](options.folder, options.new_memory)))
        return
    rates: dict[str, list[float]] = {what: [] for what in READINGS}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        nbytes = make_checkpoint(folder, options.layers)
        print(f"{nbytes / 1e9:.2f} GB in {len(weight_files(folder))} files; {os.cpu_count()} cores", flush=True)
        for _ in range(options.rounds):
            for what, found in rates.items():
                result = in_own_process(what, folder, options.new_memory)
                found.append(nbytes / result["time_s"] / 1e9)
                print(
                    f"  {what:<6} {result['time_s']:6.2f} s {found[-1]:6.2f} GB/s {result['cpu_s']:6.2f} CPU s",
                    flush=True,
                )
        peak, before = (result[f"{when}_bytes"] / nbytes for when in ("peak", "before"))
    disk, memory, loader = map(statistics.median, rates.values())
    print(f"  medians: the loader has {loader / memory:.0%} of the rate into memory, {loader / disk:.0%} of the disk's")
    print(f"  peak memory: {peak:.2f} times the weights; {before:.2f} were there before")


if __name__ == "__main__":
    main()
