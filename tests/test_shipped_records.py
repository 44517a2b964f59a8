"""Every record that the repository ships is read by the class that writes it, and comes back as it was."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pipeline.model import step_options
from splash_attn import tuned
from splash_workbench.records import jsonl
from splash_workbench.records.generation import GenerationRecord
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.records.quality import PairRecord, QualityRecord
from splash_workbench.records.step_search import StepSearchRecord
from tuning.trials import contenders
from tuning.trials.records import TRIALS_FILE, Trial
from tuning.validate.record import Validation
from tuning.validate.table import group_lines

RESULTS = Path(__file__).parent.parent / "results"
KINDS: dict[str, type] = {
    "predict.jsonl": PredictionRecord,
    "steps.jsonl": StepSearchRecord,
    "quality.jsonl": QualityRecord,
    "pairs.jsonl": PairRecord,
    "generate.jsonl": GenerationRecord,
    TRIALS_FILE: Trial,
    contenders.FILE_NAME: contenders.SideBySide,
}
FILES = sorted(RESULTS.rglob("*.jsonl"))


def test_the_documentation_says_how_near_first_passes_come() -> None:
    """Of the candidates that one search estimated and another compiled whole."""

    def ms(study: str, compiled: str) -> dict[str, float]:
        (path,) = (RESULTS / "sweeps").glob(f"cogvideox_720p-v6e-offline-{study}/{TRIALS_FILE}")
        found = [trial for trial in jsonl.read(path, Trial) if trial.compiled == compiled]
        return {trial.key: trial.time_ms for trial in found if trial.time_ms is not None}

    estimated, whole = ms("a571388b", "shorter"), ms("57aacb58", "whole")
    both = sorted(estimated.keys() & whole.keys())
    off = np.array([estimated[key] / whole[key] - 1 for key in both]) * 100
    rank = scipy.stats.spearmanr([estimated[key] for key in both], [whole[key] for key in both]).statistic
    said = (
        f"Of the {len(both)} that are in both {(abs(off) <= 1).sum()} are within 1 % "
        f"(median {np.median(off):.1f}, {off.min():.1f} to {off.max():+.1f} %; rank correlation {rank:.2f})"
    )
    assert said in " ".join((RESULTS.parent / "docs" / "tuning.md").read_text(encoding="utf-8").split())
    assert min(whole, key=whole.__getitem__) in {
        trial.key
        for trial in jsonl.read(RESULTS / "sweeps/cogvideox_720p-v6e-offline-a571388b" / TRIALS_FILE, Trial)
        if trial.compiled == "whole"
    }


def test_the_documentation_has_the_table_of_the_record() -> None:
    validation = Validation.read(RESULTS / "validate" / "wide.json")
    documentation = (RESULTS.parent / "docs" / "predictions.md").read_text(encoding="utf-8")
    lines = {line.rstrip() for line in documentation.splitlines()}
    assert [line for line in group_lines(validation) if line.rstrip() not in lines] == []
    made_by = ", ".join(f"{count} rows by libtpu {version}" for version, count in sorted(validation.compilers.items()))
    assert made_by in " ".join(documentation.split())


@pytest.mark.parametrize("name", ["wide", "splash"])
def test_a_validation_names_its_picture_without_a_folder(name: str) -> None:
    assert Validation.read(RESULTS / "validate" / f"{name}.json").picture == f"{name}.png"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_shipped_json_lines_are_read_and_survive_being_written_again(path: Path, tmp_path: Path) -> None:
    kind = KINDS[path.name]
    records = jsonl.read(path, kind)
    assert len(records) == sum(bool(line) for line in path.read_text(encoding="utf-8").splitlines())
    for record in records:
        jsonl.append(tmp_path / path.name, record)
    assert jsonl.read(tmp_path / path.name, kind) == records


@pytest.mark.parametrize("path", sorted(tuned.TUNED_DIR.glob("*.json")), ids=lambda path: path.name)
def test_shipped_tuned_entries_are_read_as_they_are(path: Path) -> None:
    content = json.loads(path.read_text())
    assert [entry.to_dict() for entry in tuned.read_file(path).entries] == content["entries"]


def test_shipped_compiler_options_are_the_winners_on_record() -> None:
    won = {str(r.call): r.winner for r in jsonl.read(RESULTS / "steps.jsonl", StepSearchRecord)}
    entries = step_options.read(step_options.SHIPPED)
    assert entries
    for entry in entries:
        winner = won[str(jsonl.encode(entry.call))]
        assert (entry.options, entry.time_s) == (winner.options, winner.time_s)
        assert entry.default_time_s is None or entry.time_s < entry.default_time_s
        assert step_options.find(entry.call) == entry


def _kept(fields: Any, record: Any) -> bool:
    """Whether all that a file says is in the record read from it."""
    if isinstance(fields, dict):
        return all(_kept(value, record[name]) for name, value in fields.items())
    if isinstance(fields, list):
        return len(fields) == len(record) and all(map(_kept, fields, record))
    return fields == record


@pytest.mark.parametrize("path", [path for path in FILES if path.name == TRIALS_FILE], ids=lambda p: p.parent.name)
def test_nothing_of_a_shipped_trial_is_lost(path: Path) -> None:
    for line, trial in zip(path.read_text().splitlines(), jsonl.read(path, Trial), strict=True):
        fields = json.loads(line)
        if fields["numerics"]:
            assert fields["numerics"].pop("same_block_sizes", True)  # said by every older record, and dropped
        assert _kept(fields, jsonl.encode(trial))
