from pathlib import Path

import pytest

import offline_tpu
from offline_tpu import compile
from offline_tpu.machine import devices

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
    ],
)
def test_names_of_topologies(name: str, expected: str) -> None:
    device, actual = compile.parse_topology(name)
    assert actual == expected
    assert device.name == name[:3]


@pytest.mark.parametrize("name", ["v6e-7", "v6e-many", "v99-8"])
def test_an_unknown_topology_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        compile.parse_topology(name)


def test_a_megacore_is_refused_by_name_and_reason() -> None:
    with pytest.raises(ValueError, match="device='v5p': not supported: its two TensorCores share"):
        compile.parse_topology("v5p")


@pytest.fixture
def dump_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_jf_dump_to={tmp_path / 'dump'}")


def test_another_libtpu_is_refused_with_both_versions(dump_flag: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "version", lambda package: "9.9.9")
    with pytest.raises(RuntimeError, match=rf"libtpu 9\.9\.9 is installed, expected {offline_tpu.SUPPORTED_LIBTPU}"):
        offline_tpu.predict(lambda x: x, device=V6E)


def test_a_process_without_the_dump_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    with pytest.raises(RuntimeError, match="worker_environment"):
        offline_tpu.predict(lambda x: x, device=V6E)


def test_device_and_topology_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="expected one of them"):
        offline_tpu.predict(lambda x: x, device=V6E, topology="v6e-8")
