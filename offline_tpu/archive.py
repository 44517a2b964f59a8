"""Keeps what a compilation dumped in one file, so that it can be read again with another model of time."""

import os
import tarfile
from pathlib import Path

import msgspec

#: Of a dump the files that `offline_tpu.dump` reads.
_READ = ("-final_bundles.txt", "-per-bundle-utilization.txt", "-TLP-hlo.txt", "-vmem_report.html", "-overlay-graph.txt")
_FACTS = "facts.json"


class Facts(msgspec.Struct, frozen=True):
    """What the dump does not say: coordinates of the chips, bytes of HBM, and what compiling took."""

    coords: list[list[int]]
    peak_hbm_bytes: int
    peak_live_bytes: int
    compile_time_s: float
    compile_cpu_s: float


def pack(folder: Path, facts: Facts, path: Path) -> None:
    """Write the files of a dump that are read, and the facts, to an archive (some MB). It is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / _FACTS).write_bytes(msgspec.json.encode(facts))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with tarfile.open(part, "w:gz", compresslevel=1) as archive:
            for file in sorted(folder.iterdir()):
                if file.name == _FACTS or file.name.endswith(_READ):
                    archive.add(file, file.name)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        (folder / _FACTS).unlink()


def unpack(path: Path, folder: Path) -> Facts:
    """Unpack an archive. Returns its facts.

    Raises:
      ValueError: the file is not such an archive; delete it.
    """
    try:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return msgspec.json.decode((folder / _FACTS).read_bytes(), type=Facts)
    except (tarfile.TarError, EOFError, OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path}: not an archive of a dump ({error}); delete it.") from error
