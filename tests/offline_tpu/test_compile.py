import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import offline_tpu
from helpers import PLENTY_S
from offline_tpu import libtpu
from offline_tpu.machine import devices
from offline_tpu.machine.topology import parse_topology
from splash_workbench.errors import UserError
from splash_workbench.provenance import REPO_ROOT
from tuning.backends.offline import OFFLINE

V6E = devices.by_name("v6e")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v6e", "v6e:2x4"),
        ("v6e-1", "v6e:1x1"),
        ("v6e-4", "v6e:2x2"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-16", "v6e:4x4"),
        ("v6e:4x8", "v6e:4x8"),
        ("v5e-8", "v5e:2x4"),
        ("v7x", "tpu7x:2x2x1"),
        ("v7x-8", "tpu7x:2x2x1"),
        ("v7x:2x2x2", "tpu7x:2x2x2"),
    ],
)
def test_names_of_topologies(name: str, expected: str) -> None:
    device, actual = parse_topology(name)
    assert actual == expected
    assert device.name == name[:3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6e-7", "topology='v6e-7': expected v6e-N with N one of 1, 4, 8, 16, 32, 64, 128, 256, or chips as v6e:2x4"),
        ("v6e-many", "topology='v6e-many': expected v6e-N with N one of 1, 4"),
        ("v6e:2x2x1", "topology='v6e:2x2x1': expected"),
        ("v6e:0x4", "topology='v6e:0x4': expected"),
        ("v6e:2x", "topology='v6e:2x': expected"),
        ("v6e:32x16", "topology='v6e:32x16': expected at most 256 chips, the largest v6e slice"),
        ("v7x:99999x2x2", "topology='v7x:99999x2x2': expected at most 9216 chips"),
        ("v7x-4", "topology='v7x-4': expected v7x-N with N one of 2, 8, 16, 32, 64, 128, 256, or chips as v7x:2x2x1"),
        ("v7x:2x4", "topology='v7x:2x4': expected"),
        ("banana", "topology='banana': expected one of v6e, v5e, v5p, v7x"),
        ("v99-8", "topology='v99-8': expected one of v6e, v5e, v5p, v7x"),
        ("v4-8", "topology='v4-8': not supported: libtpu compiles for its two TensorCores as two devices"),
    ],
)
def test_an_unknown_topology_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_topology(name)


def test_a_chip_without_figures_is_refused_by_name_and_reason() -> None:
    with pytest.raises(ValueError, match="device='v4': not supported: libtpu compiles for its two TensorCores"):
        offline_tpu.predict(lambda x: x, device="v4")


@pytest.mark.parametrize("package", ["libtpu", "jaxlib"])
@pytest.mark.parametrize(
    "work", [lambda: offline_tpu.predict(lambda x: x, device=V6E), lambda: OFFLINE.find_target("v6e")]
)
def test_another_version_is_refused_with_both(
    monkeypatch: pytest.MonkeyPatch, package: str, work: Callable[[], object]
) -> None:
    expected = {"libtpu": offline_tpu.SUPPORTED_LIBTPU, "jaxlib": libtpu.SUPPORTED_JAXLIB}
    monkeypatch.setattr(libtpu, "version", lambda name: "9.9.9" if name == package else expected[name])
    with pytest.raises(UserError, match=rf"{package} 9\.9\.9 is installed, and .* {package} {expected[package]}"):
        work()


def test_a_process_that_may_use_an_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setattr(libtpu, "accelerator_visible", lambda: True)
    monkeypatch.setattr(libtpu, "_load", libtpu._load.__wrapped__)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(RuntimeError, match="expected JAX_PLATFORMS=cpu"):
            offline_tpu.predict(lambda x: x, device=V6E)
    finally:
        jax.config.update("jax_platforms", before)


def test_device_and_topology_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="expected one of them"):
        offline_tpu.predict(lambda x: x, device=V6E, topology="v6e-8")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device='v99': expected one of"):
        offline_tpu.predict(lambda x: x, device="v99")


X = jax.ShapeDtypeStruct((256, 256), "float32")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((3, X), {}, "fn=3: expected a function of arrays"),
        ((jnp.multiply, X, 2.0), {}, r"args\[1\]=2.0: expected an array, abstract or not; .* functools.partial"),
        ((lambda x: x, {"a": [X, "mean"]}), {}, r"args\[0\]\['a'\]\[1\]='mean': expected an array"),
        ((jnp.sin, X), {"compiler_options": ["a"]}, r"compiler_options=\['a'\]: expected a dict of flags"),
        ((jnp.sin, X), {"compiler_options": {3: 4}}, "compiler_options: got 3; expected a flag's name"),
        ((jnp.sin, X), {"grid_sizes": {"f": -3}}, r"grid_sizes\['f'\]=-3: expected a whole number, 0 or more"),
        ((jnp.sin, X), {"trip_counts": {"f": "a"}}, r"trip_counts\['f'\]='a': expected a whole number"),
        ((jnp.sin, X), {"grid_sizes": [3]}, r"grid_sizes=\[3\]: expected a dict of whole numbers, by name"),
        ((jnp.sin, X), {"values": [1, 2]}, r"values=\[1, 2\]: expected a dict of arrays, by position"),
        ((jnp.sin, X), {"auto_layouts": "no"}, "auto_layouts='no': expected True or False"),
        ((jnp.sin, X), {"kept": "/"}, "kept=/: expected a file, got a folder"),
        ((jnp.sin, X), {"device": 5}, "device=5: expected one of v6e, v5e"),
        ((jnp.sin, X), {"device": None, "topology": 8}, "topology=8: expected a name"),
    ],
)
def test_what_is_no_call_is_refused_in_one_line(args: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message) as raised:
        offline_tpu.predict(*args, **({"device": V6E} | options))
    assert "\n" not in str(raised.value)


@pytest.mark.compile
def test_calls_in_threads_wait_for_one_another() -> None:
    """libtpu dumps into one folder a process, and aborts where another call has removed it."""
    with ThreadPoolExecutor(3) as threads:
        times = list(threads.map(lambda n: offline_tpu.predict(lambda a: a @ a + n, X, device=V6E).time_s, [1, 1, 1]))
    assert times[0] == times[1] == times[2] > 0


@pytest.mark.compile
def test_a_function_that_returns_nothing_is_predicted() -> None:
    assert offline_tpu.predict(lambda a: None, X, device=V6E).time_s >= 0


@pytest.mark.compile
def test_transfers_with_the_host_are_refused_with_what_to_do() -> None:
    with pytest.raises(offline_tpu.UnknownDumpFormatError, match=r"jax.debug.print and callbacks are such: leave them"):
        offline_tpu.predict(lambda a: (jax.debug.print("{}", a.sum()), a)[1], X, device=V6E)


@pytest.mark.compile
def test_a_folder_of_the_user_that_libtpu_dumps_to_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_text("dumped before")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_jf_dump_to={tmp_path}")
    assert offline_tpu.predict(jnp.sin, X, device=V6E).time_s > 0
    assert (tmp_path / "kept").read_text() == "dumped before"


@pytest.mark.compile
@pytest.mark.parametrize("is_jitted", [False, True])
def test_a_sharded_function_is_predicted_as_often_as_one_likes(is_jitted: bool) -> None:
    """JAX keeps what it has compiled, and a hit would bring no schedule."""
    mesh = offline_tpu.topology_mesh("v6e-4", (4,), ("rows",))
    x = jax.ShapeDtypeStruct((1024, 256), "float32", sharding=jax.NamedSharding(mesh, jax.P("rows")))

    def twice(a: jax.Array) -> jax.Array:
        return a + a

    fn = jax.jit(twice) if is_jitted else twice
    first, second = (offline_tpu.predict(fn, x, topology="v6e-4", mesh=mesh) for _ in range(2))
    assert first.time_s == second.time_s > 0


@pytest.mark.compile
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "v5e"}, "mesh: its devices are TPU v6 lite; expected one of offline_tpu.topology_mesh, of v5e"),
        ({"topology": "v5e-4"}, "mesh: its devices are TPU v6 lite; expected .* of v5e-4"),
        ({"topology": "v6e-8"}, "mesh: it has 4 devices, and v6e-8 has 8"),
    ],
)
def test_a_mesh_of_other_devices_is_refused(options: Any, message: str) -> None:
    """It was predicted by one chip's schedule at the other's clock."""
    mesh = offline_tpu.topology_mesh("v6e-4", (4,), ("rows",))
    with pytest.raises(ValueError, match=message):
        offline_tpu.predict(jnp.sin, X, mesh=mesh, **options)


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        (8, ("a",), "shape=8: expected a tuple of whole numbers"),
        ((2, -4), ("a", "b"), r"shape=\(2, -4\): expected a tuple of whole numbers"),
        ((2, 4), "ab", "axis_names='ab': expected a tuple of names"),
        ((2, 4), ("a", "a"), r"axis_names=\('a', 'a'\): expected a tuple of names, another for each axis of"),
        ((2, 4), ("a",), r"axis_names=\('a',\): expected a tuple of names"),
        ((3,), ("a",), r"shape=\(3,\): expected 8 devices, as v6e-8 has"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape: Any, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offline_tpu.topology_mesh("v6e-8", shape, names)


def test_a_temporary_folder_that_libtpu_cannot_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the process, or left no schedule."""
    spaced = tmp_path / "my files"
    spaced.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spaced))
    with pytest.raises(UserError, match="my files: libtpu's flags take no folder with a space; name another"):
        OFFLINE.find_target("v6e")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    with pytest.raises(UserError, match=r"^TMPDIR: cannot write .* to /proc/self"):
        OFFLINE.find_target("v6e")


def test_flags_of_the_process_are_told_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OFFLINE_TPU_DUMP_DIR", raising=False)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_of_this_test=7")
    for _ in range(2):
        OFFLINE.find_target("v6e")
    assert caplog.text.count("LIBTPU_INIT_ARGS=--xla_tpu_of_this_test=7: predictions do not use it") == 1


@pytest.mark.compile
def test_names_that_nothing_has_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0, 0] < 3, lambda y: y + 1, x)

    offline_tpu.predict(loop, X, device=V6E, grid_sizes={"mispelt": 3}, trip_counts={"nowhere": 3, "while": 2})
    assert "grid_sizes: no kernel is named mispelt; it has none" in caplog.text
    assert "trip_counts: no loop's scope contains 'nowhere'; they are jit(" in caplog.text
    assert "'while'" not in caplog.text


@pytest.mark.compile
def test_booleans_of_xlas_own_options(caplog: pytest.LogCaptureFixture) -> None:
    options = {"xla_embed_ir_in_executable": True, "xla_tpu_enable_latency_hiding_scheduler": np.bool(False)}
    predicted = offline_tpu.predict(jnp.sin, X, device=V6E, compiler_options=options)
    assert predicted.compiler_options == dict.fromkeys(sorted(options), "true") | {
        "xla_tpu_enable_latency_hiding_scheduler": "false"
    }


@pytest.mark.compile
def test_a_persistent_cache_of_the_user_is_left_alone(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A hit would bring no schedule; JAX warns of an entry that it cannot load without the chip."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in options}
    compilation_cache.reset_cache()
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        x = jax.ShapeDtypeStruct((256, 256), "float32")
        first, second = (offline_tpu.predict(lambda a: a @ a, x, device=V6E) for _ in range(2))
        assert first.cycles == second.cycles > 0
        assert not list(tmp_path.glob("[!.]*")) and not [str(w.message) for w in recwarn if "cache" in str(w.message)]
        assert {name: jax.config.values[name] for name in options} == options
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.slow("1 min")
@pytest.mark.compile
def test_the_page_says_what_its_code_prints() -> None:
    page = (REPO_ROOT / "docs" / "offline_tpu.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    expected = page.partition("```text\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PLENTY_S, check=False, cwd=REPO_ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == expected


@pytest.fixture
def another_libtpu(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another libtpu than predictions need is installed. Returns the folder for one beside it."""
    monkeypatch.setattr(libtpu, "version", lambda name: {"libtpu": "0.0.42.1"}.get(name, libtpu.SUPPORTED_JAXLIB))
    return libtpu.folder_beside()


def test_another_libtpu_may_lie_beside_the_one_that_runs(another_libtpu: Path) -> None:
    with pytest.raises(UserError, match=rf"or beside it: pip install --no-deps --target {another_libtpu} libtpu=="):
        offline_tpu.check_setup()
    info = another_libtpu / f"libtpu-{libtpu.SUPPORTED_LIBTPU}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: libtpu\nVersion: {libtpu.SUPPORTED_LIBTPU}\n")
    variables = offline_tpu.worker_environment(V6E, another_libtpu)
    assert variables["TPU_LIBRARY_PATH"] == str(another_libtpu / "libtpu" / "libtpu.so")
    assert offline_tpu.capture().versions["libtpu"] == libtpu.SUPPORTED_LIBTPU
    info.rename(info.with_name("libtpu-0.0.43.dist-info"))
    (another_libtpu / "libtpu-0.0.43.dist-info" / "METADATA").write_text("Name: libtpu\nVersion: 0.0.43\n")
    assert libtpu.compiler_version() == "0.0.42.1"


def test_the_installed_libtpu_comes_first_where_it_will_do() -> None:
    assert "TPU_LIBRARY_PATH" not in offline_tpu.worker_environment(V6E, Path("dump"))
