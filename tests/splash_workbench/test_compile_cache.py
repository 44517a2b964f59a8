"""Compiled programs on disk: a folder that cannot be made, and entries that a full disk or a kill left in part."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from helpers import PLENTY_S
from splash_workbench import compile_cache

_START = """
import sys, jax
from pathlib import Path
from splash_workbench.compile_cache import use_compilation_cache

use_compilation_cache(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


def test_a_cache_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compile_cache.use_compilation_cache(tmp_path / "file" / "compiled")
        assert f"cache: cannot write to {tmp_path / 'file' / 'compiled'} (Not a directory)" in caplog.text
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_a_damaged_entry_is_made_anew(kept_bytes: int, tmp_path: Path) -> None:
    def start() -> str:
        command = [sys.executable, "-c", _START, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PLENTY_S)
        assert done.stdout == "7.0\n"
        return done.stderr

    start()
    entries = list(tmp_path.glob("jit__lambda*-cache"))
    assert entries
    whole = {entry: entry.read_bytes() for entry in entries}
    for entry, data in whole.items():
        entry.write_bytes(data[:kept_bytes])
    said = start()
    assert f"cache: in {tmp_path} the compiled program" in said and "Error reading" not in said
    assert {entry: entry.read_bytes() for entry in entries} == whole
    assert start() == ""
