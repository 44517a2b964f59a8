"""The search as a state machine: what it asks, what it is told, and what it knows after any death."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from splash_attn.types import AttentionShape
from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from tuning.search.space import Candidate, Candidates, Space
from tuning.search.study import Search, SearchSettings
from tuning.trials.records import Trial
from tuning.trials.workloads import Workload

SHAPE = AttentionShape(batch_size=1, num_heads=3, q_seq_len=1021, kv_seq_len=1013, head_dim=64)
CHOICES = {"block_q": (128, 256, 384), "block_kv": (256, 512), "block_kv_compute": (128, 256)}
FIRST = {"block_q": 384, "block_kv": 512, "block_kv_compute": 256}
SPACE = Space("test", CHOICES)
CANDIDATES = SPACE.candidates(Workload("test", SHAPE, "bfloat16"))
SAMPLERS = pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
#: Grid and random propose alike, in another order.
ALIKE_SLOW = pytest.mark.parametrize("sampler", ["grid", pytest.param("random", marks=pytest.mark.slow("1 s")), "tpe"])


@pytest.fixture(scope="module")
def empty_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file in which Optuna has made its tables, which takes longer than most of these tests, and no study."""
    path = tmp_path_factory.mktemp("optuna") / "empty.sqlite3"
    optuna.storages.RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def make_search(tmp_path: Path, empty_study: Path) -> Callable[..., Search]:
    """Open the study of a space of 12 candidates, all in one file: the second time it resumes."""
    shutil.copyfile(empty_study, tmp_path / "study.sqlite3")

    def make(
        sampler: str = "grid",
        max_trials: int | None = None,
        seed: int = 0,
        known: dict[str, Trial] | None = None,
        first: tuple[dict[str, int], ...] = (),
        candidates: Candidates = CANDIDATES,
        name: str = "study",
    ) -> Search:
        settings = SearchSettings(sampler, max_trials, seed)
        space = Space("test", CHOICES, first)
        return Search(tmp_path / "study.sqlite3", name, space, candidates, settings, known or {})

    return make


@pytest.fixture
def trial_of(make_trial: Callable[..., Trial]) -> Callable[..., Trial]:
    """Make the trial of a candidate: ok, and faster the longer block_q is, unless told otherwise."""

    def trial_of(candidate: Candidate, **changes: object) -> Trial:
        time_ms = 1e4 / candidate.block_sizes.block_q
        timed = {} if "status" in changes else {"time_samples_ms": (time_ms,)}
        blocks = {"block_sizes": candidate.block_sizes, "variant": candidate.variant.to_dict()}
        return make_trial(**blocks, **timed, **changes)

    return trial_of


def ask_all(search: Search, trial_of: Callable[..., Trial]) -> list[str]:
    """Ask and tell to the end; return the keys in order."""
    keys = []
    while (candidate := search.ask()) is not None:
        keys.append(candidate.key)
        search.tell(candidate, trial_of(candidate))
    return keys


@SAMPLERS
def test_every_candidate_is_asked_once(make_search, trial_of, sampler):
    search = make_search(sampler)
    keys = ask_all(search, trial_of)
    assert len(keys) == search.budget == 12
    assert set(keys) == {candidate.key for candidate in CANDIDATES.valid} == set(search.told)
    assert search.ask() is None


def test_grid_has_the_order_of_the_space(make_search, trial_of):
    assert ask_all(make_search(), trial_of) == [candidate.key for candidate in CANDIDATES.valid]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_seed_decides_the_order(make_search, trial_of, sampler):
    orders = [ask_all(make_search(sampler, 8, seed, name=name), trial_of) for name, seed in (("a", 1), ("b", 1))]
    assert orders[0] == orders[1]
    assert ask_all(make_search(sampler, 8, 2, name="c"), trial_of) != orders[0]


@SAMPLERS
def test_what_the_space_names_first_comes_first(make_search, sampler):
    assert make_search(sampler, first=(FIRST,)).ask() == SPACE.candidate_of(FIRST)


@ALIKE_SLOW
def test_candidates_that_are_out_count_for_the_budget(make_search, sampler):
    search = make_search(sampler, max_trials=3)
    assert search.budget == 3
    asked = [search.ask() for _ in range(3)]
    assert len({candidate.key for candidate in asked}) == 3
    assert search.ask() is None


@ALIKE_SLOW
def test_a_larger_budget_goes_on(make_search, trial_of, sampler):
    before = ask_all(make_search(sampler, max_trials=5), trial_of)
    known = {candidate.key: trial_of(candidate) for candidate in CANDIDATES.valid if candidate.key in before}
    assert ask_all(make_search(sampler, max_trials=5, known=known), trial_of) == []
    more = make_search(sampler, max_trials=8, known=known)
    assert set(more.told) == set(before) and more.interrupted == ()
    after = ask_all(more, trial_of)
    assert len(after) == 3 and not set(after) & set(before)


@ALIKE_SLOW
def test_what_was_interrupted_comes_first(make_search, trial_of, sampler):
    dead = make_search(sampler)
    done, *running = [dead.ask() for _ in range(3)]
    dead.tell(done, trial_of(done))
    resumed = make_search(sampler, known={done.key: trial_of(done)}, first=(FIRST,))
    assert resumed.interrupted == tuple(running)
    assert [resumed.ask(), resumed.ask()] == running
    assert set(resumed.told) == {done.key}


@ALIKE_SLOW
def test_a_record_that_was_not_told_is_told_on_resuming(make_search, trial_of, sampler):
    """Death between the record and the study."""
    candidate = make_search(sampler).ask()
    resumed = make_search(sampler, known={candidate.key: trial_of(candidate)})
    assert resumed.interrupted == () and set(resumed.told) == {candidate.key}
    assert len(ask_all(resumed, trial_of)) == 11


def test_a_study_whose_records_are_gone_asks_all_again(make_search, trial_of):
    ask_all(make_search(max_trials=4), trial_of)
    resumed = make_search()
    assert len(resumed.interrupted) == 4 and resumed.told == {}
    assert len(ask_all(resumed, trial_of)) == 12


def test_records_of_another_study_are_not_of_this_one(make_search, trial_of):
    """The sweep gives them when they are asked for: here they only are no obstacle."""
    known = {candidate.key: trial_of(candidate) for candidate in CANDIDATES.valid}
    search = make_search(known=known)
    assert search.told == {} and search.interrupted == ()
    assert len(ask_all(search, trial_of)) == 12


def test_a_candidate_is_told_once(make_search, trial_of):
    search = make_search()
    candidate = search.ask()
    search.tell(candidate, trial_of(candidate))
    with pytest.raises(KeyError):
        search.tell(candidate, trial_of(candidate))
    assert set(search.told) == {candidate.key}


def test_only_what_was_asked_can_be_told(make_search, trial_of):
    outside = SPACE.candidate_of(FIRST | {"block_q": 1024})
    with pytest.raises(KeyError):
        make_search().tell(outside, trial_of(outside))


def test_nothing_outside_the_valid_candidates_is_asked(make_search, trial_of):
    """Not even what an earlier run with more of them left interrupted, or what the space names first."""
    wide = make_search("tpe", first=(FIRST,))
    assert wide.ask() == SPACE.candidate_of(FIRST)
    few = Candidates(tuple(c for c in CANDIDATES.valid if c.block_sizes.block_q == 128), {})
    narrow = make_search("tpe", first=(FIRST,), candidates=few)
    assert narrow.interrupted == () and narrow.budget == 4
    assert set(ask_all(narrow, trial_of)) == {candidate.key for candidate in few.valid}


@ALIKE_SLOW
def test_failures_count_and_are_not_asked_again(make_search, trial_of, sampler):
    search = make_search(sampler)
    for status in (Status.CRASHED, Status.OUT_OF_MEMORY, Status.TIMEOUT):
        candidate = search.ask()
        search.tell(candidate, trial_of(candidate, status=status, numerics=None))
    resumed = make_search(sampler, known=dict(search.told))
    assert set(resumed.told) == set(search.told)
    assert not set(ask_all(resumed, trial_of)) & set(search.told)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sampler": "guess"}, "search.sampler='guess': expected one of"), ({"max_trials": 0}, "search.max_trials=0: ")],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**({"sampler": "grid", "max_trials": None, "seed": 0} | change))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_params SET distribution_json = '{'",
        "UPDATE trial_params SET distribution_json = '{}'",
        "UPDATE trial_params SET param_value = 'x'",
        "UPDATE trials SET state = 'UNHEARD OF'",
        "UPDATE alembic_version SET version_num = 'v0.9.0.a'",
        "ALTER TABLE studies DROP COLUMN study_name",
    ],
)
def test_a_study_that_cannot_be_read_is_one_refusal(
    make_search: Callable[..., Search], tmp_path: Path, statement: str
) -> None:
    make_search("tpe").ask()
    with contextlib.closing(sqlite3.connect(tmp_path / "study.sqlite3")) as database, database:
        for index in database.execute(
            "SELECT name FROM sqlite_master WHERE type='index' AND sql IS NOT NULL"
        ).fetchall():
            database.execute(f"DROP INDEX {index[0]}")  # of a column to drop
        database.execute(statement)
    with pytest.raises(UserError, match=r"study\.sqlite3: this study cannot be read or written \(.*delete it"):
        make_search("tpe")


def test_what_exceeds_vmem_rules_out_what_is_larger(
    make_search: Callable[..., Search], trial_of: Callable[..., Trial]
) -> None:
    search = make_search()
    while (candidate := search.ask()) is not None:
        too_large = candidate.block_sizes.block_q >= 256
        search.tell(candidate, trial_of(candidate, **({"status": Status.OUT_OF_MEMORY} if too_large else {})))
    # Of the 12: the four of block_q 128, and of block_q 256 the smaller block_kv, with each block_kv_compute.
    assert len(search.told) == 6 and len(search.ruled_out) == 6
    assert make_search(known=search.told).ask() is None


def test_what_runs_today_is_asked_before_what_the_space_names_first(tmp_path: Path) -> None:
    today = CANDIDATES.valid[7].key
    settings = SearchSettings("tpe", None, 0)
    space = Space("test", CHOICES, (FIRST,))
    search = Search(tmp_path / "a.sqlite3", "study", space, CANDIDATES, settings, {}, ["of another space", today])
    asked = [search.ask() for _ in range(2)]
    assert [candidate and candidate.key for candidate in asked] == [
        today,
        space.candidate_of(space.complete(FIRST)).key,
    ]


def test_a_search_that_gains_nothing_stops_and_says_so(
    make_search: Callable[..., Search], trial_of: Callable[..., Trial], tmp_path: Path
) -> None:
    settings = SearchSettings("grid", None, 0, patience=3)
    search = Search(tmp_path / "other.sqlite3", "study", Space("test", CHOICES), CANDIDATES, settings, {})
    while (candidate := search.ask()) is not None:
        search.tell(candidate, trial_of(candidate))
    # Times fall with block_q: four candidates each of 128, 256 and 384, in this order.
    assert search.stopped == "stopped after 4 trials: the last 3 gained less than 1%"
    with pytest.raises(ValueError, match=r"search\.patience=0: expected at least 1"):
        SearchSettings("grid", None, 0, patience=0)


def test_the_parameter_that_matters_is_told(make_search: Callable[..., Search], trial_of: Callable[..., Trial]) -> None:
    search = make_search()
    while (candidate := search.ask()) is not None:
        search.tell(candidate, trial_of(candidate))
    found = search.importances()
    assert next(iter(found)) == "block_q"
