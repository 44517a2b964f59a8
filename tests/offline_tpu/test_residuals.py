import json
from pathlib import Path

import pytest

import offline_tpu
from offline_tpu.machine import residuals
from offline_tpu.machine.residuals import MIN_ROWS, Residual
from splash_workbench import provenance


@pytest.fixture
def known(monkeypatch):
    def read():
        few, many = MIN_ROWS - 1, MIN_ROWS
        return {
            "kernel": {"v6e": Residual(0.9, 1.1, many), "v5e": Residual(0.1, 9.0, few), "all": Residual(0.8, 1.2, 99)},
            "memory": {"all": Residual(1.0, 1.4, 99)},
            "collective": {"all": Residual(0.99, 1.01, few)},
        }

    monkeypatch.setattr(residuals, "_read", read)


def test_ends_are_weighed_by_the_time_of_each_kind(known):
    assert residuals.factors("v6e", {"kernel": 3.0, "elementwise": 0.5, "layout": 0.5}) == pytest.approx((0.925, 1.175))


def test_with_few_rows_of_a_device_those_of_all_count(known):
    assert residuals.factors("v5e", {"kernel": 1.0}) == (0.8, 1.2)


def test_of_a_kind_that_few_rows_are_of_the_interval_is_wide(known):
    low, high = residuals.factors("v6e", {"collective": 1.0})
    assert low <= 0.7 and high >= 1.5
    assert residuals.factors("v6e", {}) == (low, high)


def test_the_shipped_residuals_are_readable():
    for by_device in residuals._read().values():
        assert all(0 < found.low <= found.high and found.rows for found in by_device.values())


def test_what_is_cached_depends_on_the_intervals(tmp_path: Path) -> None:
    path = tmp_path / "offline_tpu/machine/residuals.json"
    path.parent.mkdir(parents=True)
    hashes = []
    for high in (1.1, 1.2):
        path.write_text(json.dumps({"kernel": {"v6e": {"low": 0.9, "high": high, "rows": 8}}}))
        hashes.append(provenance.source_hash(offline_tpu.SOURCES, tmp_path))
    assert hashes[0] != hashes[1]
