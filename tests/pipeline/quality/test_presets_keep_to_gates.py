"""A preset of quality has only what passed its gate on the tiny model, by results/quality.jsonl."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.requests.reuse import PRESETS, Preset
from splash_workbench.records import jsonl
from splash_workbench.records.quality import QualityRecord

PATH = Path(__file__).parents[3] / "results" / "quality.jsonl"
APPROXIMATE = [name for name in PRESETS if name != "exact"]


def newest() -> dict[str, QualityRecord]:
    """Return the last record of each mode of the tiny model with 32 steps: of 8 none is left out."""
    records = [record for record in jsonl.read(PATH, QualityRecord) if record.video.num_inference_steps == 32]
    return {record.candidate: record for record in records if record.video.checkpoint == "tiny"}


def parts(preset: Preset) -> list[str]:
    """Return the modes that a preset is made of, as candidates of configs/modes/tiny.yaml are called."""
    used = {
        "int8": preset.int8,
        "int8 linears": preset.int8,
        "teacache": preset.teacache is not None,
        "magcache": preset.magcache is not None,
        "unconditional": preset.unconditional_every > 1,
    }
    return [name for name, is_used in used.items() if is_used]


def failed(preset: Preset, name: str, records: Mapping[str, QualityRecord]) -> list[str]:
    """Return the modes of a preset, itself among them, that are not on record or over their budgets."""
    return [mode for mode in (*parts(preset), name) if mode not in records or records[mode].failures]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_all_that_a_preset_uses_passed_its_gate(name):
    records = newest()
    assert failed(PRESETS[name], name, records) == []
    for mode in (*parts(PRESETS[name]), name):
        record = records[mode]
        assert record.lpips and record.budget["lpips"] < 1 and record.budget["psnr_db"] > 0
        assert len(record.lpips) == len(record.readings) == len(record.psnr_db)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_what_passed_is_the_preset_of_today(name):
    preset, chosen = PRESETS[name], newest()[name].chosen
    assert chosen["qk_dtype"] == chosen["quantization"] == ("int8" if preset.int8 else None)
    assert (chosen["method"], chosen["threshold"]) == ("magcache", preset.magcache)
    assert chosen["unconditional_every"] == preset.unconditional_every


def test_a_preset_with_a_mode_that_failed_is_seen():
    records = newest()
    worse = {
        **records,
        "unconditional": jsonl.decode({**jsonl.encode(records["unconditional"]), "failures": ["x"]}, QualityRecord),
    }
    assert failed(PRESETS["fastest"], "fastest", worse) == ["unconditional"]
    assert failed(PRESETS["fast"], "fast", {}) == ["int8", "int8 linears", "teacache", "magcache", "fast"]
