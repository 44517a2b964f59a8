import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from splash_workbench.profiles import profiler, sessions
from tuning.backends import device_times

_PROFILE_AFTER_LIBTPU = """
import pathlib, sys
import jax
from offline_tpu.libtpu import find_dump_dir
from splash_workbench.profiles import profiler

find_dump_dir()  # loads libtpu
with profiler.trace(pathlib.Path(sys.argv[1]), jax.profiler.ProfileOptions()):
    jax.numpy.ones(3).block_until_ready()
"""


@pytest.mark.compile
def test_a_process_that_compiles_for_tpus_can_be_profiled(tmp_path: Path) -> None:
    """jaxlib dies of SIGSEGV where it starts the profiler of another libtpu than its own."""
    subprocess.run([sys.executable, "-c", _PROFILE_AFTER_LIBTPU, tmp_path], check=True, timeout=300)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def trace(logdir: Path, options: object) -> Iterator[None]:
        yield
        raise RuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device")

    monkeypatch.setattr(profiler, "trace", trace)
    with sessions.Recorder(tmp_path, "run", {}).record("denoise"):
        computed = True
    assert computed
    assert f"logdir={tmp_path}: the trace of run-denoise was not written (RESOURCE_EXHAUSTED" in caplog.text
    with pytest.raises(RuntimeError, match="stop"), sessions.Recorder(tmp_path, "run", {}).record():
        raise RuntimeError("stop")


def _pretend_jax_loaded(monkeypatch: pytest.MonkeyPatch, libtpu: str) -> None:
    monkeypatch.setattr(profiler, "_loaded_without_profiler", False)
    monkeypatch.setattr(profiler.xla_client, "pjrt_plugin_loaded", lambda name: name == "tpu")
    monkeypatch.setattr(profiler.metadata, "version", {"libtpu": libtpu}.__getitem__)
    monkeypatch.setattr(profiler.metadata, "requires", lambda name: ["numpy>=2.0", 'libtpu==0.0.42.*; extra == "tpu"'])


def test_the_profiler_of_another_libtpu_is_refused_before_it_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_jax_loaded(monkeypatch, "0.0.52")
    message = r"libtpu 0\.0\.52 is installed, .* needs libtpu==0\.0\.42\.\*; pip install 'jax\[tpu\]=="
    with pytest.raises(profiler.ProfilerError, match=message):
        profiler.check_profiler()
    found = device_times.measure(
        lambda: jax.numpy.ones(3), device_times.MeasureSettings(min_samples=6), platform="tpu", kernel="k"
    )
    assert found.notes[0].startswith("wall time, dispatch included: libtpu 0.0.52 is installed")


def test_the_profiler_of_jaxs_own_libtpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_jax_loaded(monkeypatch, "0.0.42.1")
    profiler.check_profiler()
