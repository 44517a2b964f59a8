"""The command-line layer, and what all commands have in common through it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from commands import COMMANDS, HYDRA_COMMANDS, main_of
from splash_workbench import cli
from splash_workbench.errors import TornLineWarning, UserError
from splash_workbench.overrides import Keys, as_given, key_types
from splash_workbench.provenance import CACHE_VARIABLE, CONFIG_DIR, REPO_ROOT
from splash_workbench.startup import Terminated

MISTAKES = [
    ("tuning.sweep", ("device=false",)),
    ("pipeline.generate", ("cache=3",)),
    *((module, (wrong,)) for module, wrong in COMMANDS.items()),
    *((module, ("nokey=1",)) for module in COMMANDS),
    *((module, ("+nokey=1",)) for module in COMMANDS),
    *((module, ("--no-flag", "1")) for module in COMMANDS),
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs an entry point with arguments, in an empty folder: (exit code, stdout, stderr)."""

    def run(main: Callable[[], int], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            code = main()
        except SystemExit as end:  # after --help
            code = end.code  # type: ignore[assignment]
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_every_command_is_here() -> None:
    paths = [path for package in ("offline_tpu", "tuning", "pipeline") for path in (REPO_ROOT / package).rglob("*.py")]
    files = [
        path.relative_to(REPO_ROOT)
        for path in paths
        if re.search(r'^if __name__ == "__main__"', path.read_text(), re.M)
    ]
    found = {".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in files}
    assert found == set(COMMANDS)


@pytest.mark.parametrize("module", HYDRA_COMMANDS)
def test_no_key_has_the_name_of_a_group_that_the_command_has_not(module: str) -> None:
    """Hydra would take `key=false` for a choice of the group, and end in a traceback."""
    defaults: Any = OmegaConf.load(CONFIG_DIR / f"{module.rpartition('.')[2]}.yaml")["defaults"]
    groups = {group for entry in OmegaConf.to_container(defaults) if isinstance(entry, dict) for group in entry}
    folders = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}
    values = {key for key in main_of(module).keys if "." not in key}  # type: ignore[attr-defined]
    assert values & folders <= groups


@pytest.mark.compile
@pytest.mark.parametrize("module", COMMANDS)
def test_help_leaves_nothing_behind(run: Run, module: str, tmp_path: Path) -> None:
    code, out, err = run(main_of(module), "--help")
    assert (code, err) == (0, "")
    assert f"python -m {module}" in out
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_text_that_was_given(run: Run) -> None:
    assert "[a ${b} $c, ]" in run(main_of("pipeline.generate"), "--help", "prompt=a ${b} $c")[1]


@pytest.mark.parametrize(("module", "arguments"), MISTAKES, ids=lambda value: str(value))
def test_a_mistake_is_one_line(run: Run, module: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = run(main_of(module), *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("wrokers=2", "wrokers: no such key; did you mean workers? See --help"),
        ("max_trials=2", "max_trials: no such key; did you mean search.max_trials? See --help"),
        ("space.blok_q=[128]", "space.blok_q: no such key; did you mean space.block_q"),
        ("--max-trials", "--max-trials: no such option; expected key=value; did you mean search.max_trials?"),
        ("compiler_options.xla_a=[1]", "compiler_options.xla_a=[1]: expected a number, a string, true or false."),
        ("compiler_option.xla_a=1", "compiler_option.xla_a: no such key"),
        ("backend.measure.nope.too=1", "Could not override 'backend.measure.nope.too'"),
        ("device=v4", "device=v4: libtpu compiles for its two TensorCores as two devices"),
        ("device=v9", "device=v9: no such option; expected one of local, v5e, v5p, v6e, v7x"),
        ("workers=many", "workers=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("space.block_q=[1,", "space.block_q=[1,: no viable alternative at input"),
        ("cat", 'cat: expected key=value; quote text with spaces: prompt="a cat"'),
        ("--config-dir", "argument --config-dir/-cd: expected one argument; see --hydra-help"),
        *((f"{sign}timeout_s=3", f"{sign}timeout_s=3: expected timeout_s=value; +, ~ and @ have") for sign in "+~"),
        ("~workload", "~workload: expected workload=value"),
        ("workload@mine=tiny", "workload@mine=tiny: expected workload=value"),
        ("+max_trials=3", "max_trials: no such key; did you mean search.max_trials?"),
        ("hydrate=1", "hydrate: no such key"),
        ("--multi", "--multi: no such option"),
    ],
)
def test_a_mistake_names_what_was_expected(run: Run, argument: str, message: str) -> None:
    code, _, err = run(main_of("tuning.sweep"), argument)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@dataclasses.dataclass
class Schema:
    """As configs/results.yaml has it, cut down to a text, a number and a group."""

    results_dir: str = ""
    top: int | None = None
    shape: str | None = None
    workload: Any = None
    device: Any = None
    backend: Any = None
    shape: str | None = None
    kernel: str | None = None
    status: str | None = None
    json: str | None = None


def entry_point(function: Callable[[Schema], int]) -> Callable[[], int]:
    return cli.command("results", Schema, text_or_list=("backend",))(function)


TEXTS = [
    "it's \"red\", moves: {50%} [x] = $HOME ${oc.env:HOME} \\ (end)'",
    "ends with a backslash \\",
    "a \\' b",
    "\\${x} \\\\${y",
    "日本 — ü, 123",
    '"a cat"',
    "'tis the season'",
    '"${oc.env:HOME}"',
    '"costs ${price}"',
    '"C:\\"',
    "null",
    '""',
    "'",
    "--dashes=1",
    "two\nlines\t\r\n",
    "???",
    "👩‍👩‍👧 é",
]


#: With a key for each text: one reading of the command line takes them all.
TextSchema = dataclasses.make_dataclass(
    "TextSchema", [(f"text_{n}", str, "") for n in range(len(TEXTS))], bases=(Schema,)
)


@pytest.mark.parametrize("arguments", [("",), ("++",), ("", "-m", "top=1,2")], ids=" ".join)
def test_text_is_taken_literally(run: Run, arguments: tuple[str, ...]) -> None:
    """As a value, as one that is added, and in each of several runs."""
    taken: list[list[str]] = []

    def function(settings: Any) -> int:
        taken.append([getattr(settings, f"text_{n}") for n in range(len(TEXTS))])
        return 0

    prefix, *more = arguments
    main = cli.command("results", TextSchema)(function)
    assert run(main, *more, *(f"{prefix}text_{n}={text}" for n, text in enumerate(TEXTS))) == (0, "", "")
    assert taken == [TEXTS] * (2 if more else 1)


@settings(deadline=None)
@given(st.text(alphabet="\\${}'\"[](), =:~?\nax日", min_size=1))
def test_any_text_is_quoted_so_that_it_comes_back(text: str) -> None:
    (argument,) = Keys(key_types(Schema), ()).checked([f"results_dir={text}"])
    (override,) = OverridesParser.create().parse_overrides([argument])
    config = OmegaConf.create({"results_dir": override.value(), "output": "${results_dir}/report"})
    assert (as_given(config.results_dir), as_given(config.output)) == (text, f"{text}/report")


def test_a_path_may_begin_at_home(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    taken: list[Schema] = []
    assert run(
        entry_point(lambda settings: taken.append(settings) or 0), "results_dir=~/x", "json=~/y", "kernel=~/z"
    ) == ((0, "", ""))
    assert (taken[0].results_dir, taken[0].json, taken[0].kernel) == (f"{tmp_path}/x", f"{tmp_path}/y", "~/z")
    run(main_of("tuning.choose"), "json=~/choice.json")
    run(main_of("tuning.report"), "output=~/report")
    run(main_of("tuning.compare"), "~/a.jsonl:1", "b", "--results-dir", "~/none", "--output", "~/compare")
    assert {path.name for path in tmp_path.iterdir()} == {"choice.json", "report"}


@pytest.mark.parametrize("module", HYDRA_COMMANDS)
def test_every_path_among_the_keys_is_known_as_one(module: str) -> None:
    names = {key for key, kind in main_of(module).keys.items() if kind in (str, str | None)}  # type: ignore[attr-defined]
    likely = {
        name for name in names if re.fullmatch(r"(.*_)?(dir|path|folder|from)|output|json|prompts|measured", name)
    }
    assert likely <= cli._PATHS


def test_what_is_meant_for_hydra_is_left_to_hydra() -> None:
    keys = Keys(key_types(Schema), (), text_or_list=("backend",))
    for argument in ("kernel=null", "kernel=", "top=3", "backend=[a,b]"):
        assert keys.checked([argument]) == [argument]
    assert keys.checked(["backend=a,b"]) == ["backend='a,b'"]
    assert keys.checked(["-m", "backend=a,b", "kernel=choice(a,b)"]) == ["-m", "backend='a,b'", "kernel=choice(a,b)"]
    assert keys.checked(["--multirun", "kernel=a,b, c,d"]) == ["--multirun", "kernel='a','b, c','d'"]
    assert keys.checked(["kernel=a", "--cfg", "job", "top=3"]) == ["--cfg", "job", "kernel='a'", "top=3"]


@pytest.mark.parametrize("key", ["output_dir", "logdir", "log_path"])
def test_null_is_no_path(key: str) -> None:
    keys = Keys({key: str}, ())
    with pytest.raises(UserError, match=rf"^{key}=null: expected a path; \./null is one of that name"):
        keys.checked([f"{key}=null"])
    assert Keys({key: str | None}, ()).checked([f"{key}=null"]) == [f"{key}=null"]


def test_several_runs_end_with_the_worst_code(run: Run) -> None:
    assert run(entry_point(lambda settings: settings.top or 0), "--multirun", "top=1,3,0")[0] == 3


def test_several_runs_have_a_json_each(run: Run, tmp_path: Path) -> None:
    def write(settings: Schema) -> int:
        cli.write_json(settings.json, {"top": settings.top})
        return 0

    code, _, said = run(entry_point(write), "--multirun", "top=1,2", f"json={tmp_path}/a.json")
    assert (code, said) == (
        2,
        f"error: json={tmp_path}/a.json: holds the run before; expected one a run, as json=a.json,b.json\n",
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {"top": 1}


def test_several_runs_all_happen_and_leave_nothing(run: Run, tmp_path: Path) -> None:
    """Whatever becomes of the others: every error is said, each once."""
    taken: list[int | None] = []

    def function(settings: Schema) -> int:
        taken.append(settings.top)
        if settings.top in (1, 2):
            raise UserError(f"top={settings.top}: no")
        return 1

    code, _, err = run(entry_point(function), "-m", "top=1,3,2", "kernel=a,b")
    assert (code, err) == (2, "error: top=1: no\nerror: top=2: no\n")
    assert taken == [1, 1, 3, 3, 2, 2]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_all_runs(run: Run) -> None:
    taken: list[int | None] = []

    def function(settings: Schema) -> int:
        taken.append(settings.top)
        return 143

    assert run(entry_point(function), "-m", "top=1,2")[0] == 143
    assert taken == [1]


def raising(error: BaseException) -> Callable[[Schema], int]:
    def function(settings: Schema) -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a=1: expected 2"), 2, "error: a=1: expected 2\n"),
        (UserError("first", "second\nline"), 2, "error: first\nerror: second line\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "error: a file: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command begins anew\n"),
        (Terminated(), 143, "interrupted; the same command begins anew\n"),
    ],
)
def test_exit_codes(run: Run, error: BaseException, code: int, message: str) -> None:
    assert run(entry_point(raising(error))) == (code, "", message)


def test_what_fails_in_the_cache_names_its_variable(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    remedy = f"; ${CACHE_VARIABLE} names another folder for what can be made again\n"
    for name in ("file", "file/tiny"):
        error = FileExistsError(17, "File exists", str(tmp_path / name))
        assert run(entry_point(raising(error)))[2] == f"error: {tmp_path / name}: File exists{remedy}"


def test_a_warning_of_ours_is_one_line() -> None:
    assert cli._warning_line("torn", TornLineWarning, "/a/file.py", 7, "the line") == "warning: torn\n"
    assert "/a/file.py:7: UserWarning: theirs" in cli._warning_line("theirs", UserWarning, "/a/file.py", 7, "the line")


def test_an_error_of_ours_shows_where_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run(entry_point(raising(ZeroDivisionError())))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError):
        run(entry_point(raising(UserError("x"))))


@pytest.mark.parametrize("package", ["tuning", "pipeline"])
def test_ctrl_c_among_the_imports_is_no_traceback(package: str) -> None:
    """What `python -m PACKAGE.COMMAND` imports first, with the argument that it has by then."""
    lines = ["import os, signal, sys", f"sys.path.insert(0, {str(REPO_ROOT)!r})", "sys.argv = ['-m']"]
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)"]
    lines += [f"import {package}", "os.kill(os.getpid(), signal.SIGINT)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.compile
def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """As in `python -m tuning.results | head -1`."""
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    command = [sys.executable, "-m", "tuning.results", f"results_dir={REPO_ROOT / 'results'}"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as it:
        assert it.stdout is not None and it.stderr is not None
        it.stdout.close()
        assert it.stderr.read() == b""
    assert it.returncode == 128 + signal.SIGPIPE
