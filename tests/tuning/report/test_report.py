"""The report as a command: what it makes of records, of none, and of malformed ones."""

import dataclasses
import html.parser
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splash_attn.types import BlockSizes, Variant
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label, Status
from tuning.report import __main__ as report
from tuning.report import page
from tuning.report.inputs import Inputs
from tuning.trials import promote
from tuning.trials.records import Trial

MakeTrial = Callable[..., Trial]
Run = Callable[..., tuple[int, str, str]]
KERNEL_OP = {"name": "splash_attention.1", "category": "kernel", "calls": 1, "hbm_bytes": 10**6, "time_s": 0.001}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the report in a folder of the test's own, without the project's tuned entries."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tuned").mkdir(exist_ok=True)
        monkeypatch.setattr(sys, "argv", ["report", "tuned_dir=tuned", *arguments])
        code = report.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fill(tmp_path: Path, make_trial: MakeTrial, todays: MakeTrial, samples: SimpleNamespace) -> Callable[..., Path]:
    """Writes a bit of everything to results/."""

    def fill() -> Path:
        results = tmp_path / "results"
        sweep, peers = results / "sweeps" / "tiny-v6e" / "trials.jsonl", results / "peers" / "tiny-v6e" / "trials.jsonl"
        for number, (block_q, time_ms) in enumerate([(256, 3.0), (512, 2.0), (768, 2.5)]):
            trial = make_trial(
                block_sizes=BlockSizes(block_q, 512, 128),
                time_samples_ms=(time_ms,),
                kernel_time_ms=time_ms - 0.5,
                ops=(KERNEL_OP,),
                record_id=f"r{number}",
                created_at="2026-11-23T10:00:00+00:00",
            )
            jsonl.append(sweep, trial)
            if block_q == 512:
                tuned_dir = tmp_path / "tuned"
                promote.promote(trial, [todays(trial, tuned_dir, time_samples_ms=(9.0,))], tuned_dir)
                jsonl.append(peers, trial)
        failed = {"status": Status.OUT_OF_MEMORY, "numerics": None, "error": "VMEM <full> | by far"}
        jsonl.append(sweep, make_trial(block_sizes=BlockSizes(1024, 1024, 128), record_id="r3", **failed))
        peer = {"kernel": "jax_splash", "variant": {"layout": "HEAD_DIM_MINOR"}, "ops": (KERNEL_OP,)}
        jsonl.append(peers, make_trial(time_samples_ms=(4.5,), kernel_time_ms=3.0, record_id="r4", **peer))
        own = {"kernel": "Matmul", "shape": None, "block_sizes": None, "sizes": {"m": 64}, "dtype": "", "bound_ms": 1.0}
        for number, (block, time_ms) in enumerate([(128, 8.0), (256, 2.0)]):
            when = f"2026-11-23T10:00:0{number}+00:00"
            trial = make_trial(**own, variant={"block": block}, time_samples_ms=(time_ms,), created_at=when)
            jsonl.append(
                results / "sweeps" / "Matmul-m64" / "trials.jsonl", dataclasses.replace(trial, record_id=f"o{number}")
            )
        samples.write_lines(results / "predict.jsonl", samples.predicted())
        samples.write_lines(results / "generate.jsonl", samples.generated())
        samples.write_lines(results / "quality.jsonl", samples.judged())
        samples.write_lines(results / "validate" / "quick.json", samples.validated(name="quick"))
        return results

    return fill


def _outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_without_records_the_page_says_what_to_run(run: Run, tmp_path: Path) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "python -m tuning.validate" in out
    for name in ("index.html", "report.md"):
        text = (tmp_path / "results" / "report" / name).read_text()
        for command in ("tuning.sweep", "tuning.peers", "tuning.validate", "pipeline.predict", "pipeline.generate"):
            assert f"python -m {command}" in text
        assert "12.667" in text  # what others reported is there even so


def test_the_same_records_give_the_same_bytes(run: Run, fill: Callable[[], Path], tmp_path: Path) -> None:
    fill()
    assert run("output=a")[0] == 0
    assert run("output=b")[0] == 0
    assert _outputs(tmp_path / "a") == _outputs(tmp_path / "b")
    assert set(_outputs(tmp_path / "a")) == {
        "index.html",
        "report.md",
        "parity.svg",
        "roofline-tiny-v6e-predicted.svg",
    }


def test_records_of_several_machines_count_once(fill: Callable[[], Path], tmp_path: Path) -> None:
    """Folders of two machines, as sweeps on one study leave them: each has the records of both."""
    results = fill()
    for name in ("results-0", "results-1"):
        shutil.copytree(results, tmp_path / "shared" / name)
    alone, merged = (Inputs(folder, folder / "validate") for folder in (results, tmp_path / "shared"))
    for found, expected in ((merged.sweeps, alone.sweeps), (merged.peers, alone.peers)):
        ids = [sorted(trial.record_id for file in files for trial in file.trials) for files in (found, expected)]
        assert ids[0] == ids[1] and ids[0]
    assert (len(merged.generated), len(merged.predicted)) == (2 * len(alone.generated), 2 * len(alone.predicted))


def test_pictures_of_what_is_gone_are_removed(run: Run, fill: Callable[[], Path], tmp_path: Path) -> None:
    fill()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "roofline-gone-v6e-predicted.svg").write_text("")
    (tmp_path / "out" / "mine.svg").write_text("")
    run("output=out")
    assert not (tmp_path / "out" / "roofline-gone-v6e-predicted.svg").exists()
    assert (tmp_path / "out" / "mine.svg").exists()


class _Checker(html.parser.HTMLParser):
    """Every element closed in order, none from elsewhere, ids once."""

    void = frozenset(("meta", "br", "use"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        self._attributes(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(tag, attrs)

    def _attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and value and value.startswith("#"):
                self.targets.add(value[1:])
            elif name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(run: Run, fill: Callable[[], Path], tmp_path: Path) -> None:
    fill()
    run("output=out")
    page = (tmp_path / "out" / "index.html").read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.targets <= set(checker.ids)
    assert not re.search(r"url\((?!#)|@import|<script", page)
    assert "VMEM &lt;full&gt;" in page


def test_markdown_tables_have_as_many_cells_as_their_heads(run: Run, fill: Callable[[], Path], tmp_path: Path) -> None:
    fill()
    run("output=out")
    blocks = re.findall(r"(?:^\|.*\n)+", (tmp_path / "out" / "report.md").read_text(), flags=re.MULTILINE)
    assert len(blocks) >= 9
    for block in blocks:
        lines = [re.sub(r"\\\|", "", line) for line in block.splitlines()]
        assert len({line.count("|") for line in lines}) == 1, block
        assert re.fullmatch(r"[|:\- ]+", lines[1])


def test_every_figure_of_the_sample_is_there_with_its_label(run: Run, fill: Callable[[], Path], tmp_path: Path) -> None:
    fill()
    run("output=out")
    text = (tmp_path / "out" / "report.md").read_text()
    # 2.0 ms of a kernel of 1.5; the peer's kernel takes 3.0.
    assert "**2.00** times as fast as the best other kernel, kernel alone: tiny on TPU v6e (predicted)" in text
    assert "| jax_splash | 256/512/128 | – | 3.000 | 4.500 | predicted |" in text  # noqa: RUF001
    assert "| splash_attention 1x16384x32x64 | 2048/2048/512 sss lp | 10.000 | 9.500 | −5.0 % |" in text  # noqa: RUF001
    # 50 steps of 0.5 s, and two stages of 0.5 s.
    assert "| predicted | 0.500 | 0.500 | 25.0 | 0.500 | 26.0 | 8.00 | 32 | 38 % |" in text
    assert "| denoise | 0.250 | 2.00 | 1.50 | 3 | 0.500 | 0.250 | 0.750 |" in text
    assert "measured on 1 x cpu with libtpu 0.0.52, jax 0.10.2; commit 0123456; 2026-11-23" in text
    assert "| online | measured | 3 | 41.2 | 50.0 | 0.9875 | 0.9990 | 0.0125 | 100 % | 75 % | within budget |" in text
    assert "3 ok, 1 out of memory" in text
    assert "| Matmul, m64 on TPU v6e | 2 | block=256 | 2.000 | 8.000 | 4.00 | 50 % | predicted |" in text


def test_videos_side_by_side_are_linked_where_they_are(fill: Callable[[], Path], tmp_path: Path) -> None:
    results, link = fill(), '<a href="../quality/index.html">'
    (results / "quality").mkdir()
    for exists in (False, True):
        files = page.make(Inputs(results, results / "validate", tmp_path / "tuned"), results / "report", 1)
        assert (link in files["index.html"]) == exists
        (results / "quality" / "index.html").touch()


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("path", "lines", "message"),
    [
        (
            "predict.jsonl",
            lambda samples: ["[1]"],
            "results/predict.jsonl:1: not a PredictionRecord that",
        ),
        (
            "predict.jsonl",
            lambda samples: [_without(samples.predicted(), "plan")],
            "missing required field `plan`",
        ),
        ("predict.jsonl", lambda samples: [samples.predicted(label="guessed")], "at `$.label`"),
        ("predict.jsonl", lambda samples: [samples.predicted(stages=[])], "at `$.stages`"),
        ("predict.jsonl", lambda samples: [samples.predicted(step_time_s="fast")], "at `$.step_time_s`"),
        (
            "predict.jsonl",
            lambda samples: [samples.predicted(reported={"source": "somebody"})],
            "missing required field `label` - at `$.reported`",
        ),
        (
            "generate.jsonl",
            lambda samples: ["", _without(samples.generated(), "device")],
            "generate.jsonl:2: not a GenerationRecord",
        ),
        (
            "quality.jsonl",
            lambda samples: [samples.judged(ssim=[1.0])],
            "3 PSNR and 1 SSIM figures: expected one of each",
        ),
        ("quality.jsonl", lambda samples: [_without(samples.judged(), "label")], "missing required field `label`"),
        ("validate/quick.json", lambda samples: ["{}"], "quick.json: Object missing required field `name`"),
        (
            "validate/quick.json",
            lambda samples: ["nothing"],
            "write it again with `python -m tuning.validate`",
        ),
        ("sweeps/x/trials.jsonl", lambda samples: ["{}"], "trials.jsonl:1: not a Trial"),
        ("../tuned/x.json", lambda samples: ["{}"], "x.json: unreadable tuned entries"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_it(
    run: Run,
    fill: Callable[[], Path],
    samples: SimpleNamespace,
    path: str,
    lines: Callable[[SimpleNamespace], list[dict[str, Any] | str]],
    message: str,
) -> None:
    samples.write_lines(fill() / path, *lines(samples))
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_torn_trial_is_left_out_and_said(run: Run, fill: Callable[[], Path], tmp_path: Path) -> None:
    path = fill() / "sweeps" / "tiny-v6e" / "trials.jsonl"
    with path.open("a") as file:
        file.write('{"context": "c')
    code, _, err = run("output=out")
    assert code == 0
    line = "results/sweeps/tiny-v6e/trials.jsonl:5: skipped a torn line"
    assert f"warning: {line}" in err
    assert line in (tmp_path / "out" / "report.md").read_text()


def test_measured_and_predicted_are_kept_apart_and_compared(
    run: Run, fill: Callable[[], Path], tmp_path: Path, make_trial: MakeTrial
) -> None:
    results = fill()
    measured = make_trial(
        block_sizes=BlockSizes(512, 512, 128), label=Label.MEASURED, backend="measure", time_samples_ms=(2.5,)
    )
    jsonl.append(results / "sweeps" / "tiny-v6e-measure" / "trials.jsonl", measured)
    run("output=out")
    text = (tmp_path / "out" / "report.md").read_text()
    config = f"512/512/128 {' '.join(f'{name}={value}' for name, value in Variant().to_dict().items())}"
    assert f"| tiny splash_attn {config} | measured on TPU v6 lite | 2.500 | 2.000 | −20.0 % |" in text  # noqa: RUF001
    assert "whole op, ms (measured)" in text
    # Its traffic is that of the predicted trial of the same configuration.
    assert (tmp_path / "out" / "roofline-tiny-v6e-measured.svg").exists()


def test_only_the_newest_sweep_of_its_kind_is_shown(
    run: Run, fill: Callable[[], Path], tmp_path: Path, make_trial: MakeTrial
) -> None:
    results = fill()
    environment = dataclasses.replace(make_trial().environment, kernel_hash="an-older-one")
    old = make_trial(time_samples_ms=(1.125,), created_at="2026-11-01T00:00:00+00:00", environment=environment)
    jsonl.append(results / "sweeps" / "tiny-v6e-old" / "trials.jsonl", old)
    run("output=out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1.125" not in text
    assert "`results/sweeps/tiny-v6e-old/trials.jsonl`" in text


def test_an_estimate_is_not_first_and_says_what_it_is(run: Run, tmp_path: Path, make_trial: MakeTrial) -> None:
    path = tmp_path / "results" / "sweeps" / "tiny-v6e" / "trials.jsonl"
    whole = make_trial(time_samples_ms=(14.25,))
    blocks = BlockSizes(512, 512, 128)
    estimate = make_trial(block_sizes=blocks, time_samples_ms=(14.125,), kernel_time_ms=14.0, compiled="shorter")
    for trial in (estimate, whole):
        jsonl.append(path, trial)
    run("output=out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 | 256/512/128 | – | 14.25 |" in text and "| 2 | 512/512/128 | – | ≈ 14.1" in text  # noqa: RUF001
    assert "only what was compiled whole can be first" in (tmp_path / "out" / "index.html").read_text()


def test_a_winner_of_another_kernel_source_is_marked(
    run: Run, tmp_path: Path, make_trial: MakeTrial, todays: MakeTrial
) -> None:
    environment = dataclasses.replace(make_trial().environment, kernel_hash="an-older-one")
    winner = make_trial(environment=environment)
    promote.promote(winner, [todays(winner, time_samples_ms=(99.0,))], tmp_path / "tuned")
    run("output=out")
    for name in ("index.html", "report.md"):
        assert "tuned with another kernel source" in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize("name", ["tiny", "../x", "a/b"])
def test_another_shape_under_the_same_name_hides_and_outranks_nothing(
    run: Run, fill: Callable[[], Path], tmp_path: Path, make_trial: MakeTrial, name: str
) -> None:
    results = fill()
    shape = dataclasses.replace(make_trial().shape, num_heads=24)
    other = make_trial(workload=name, shape=shape, time_samples_ms=(1.125,), kernel_time_ms=1.0, ops=(KERNEL_OP,))
    jsonl.append(results / "sweeps" / "other" / "trials.jsonl", other)
    code, _, err = run("output=out")
    assert (code, err) == (0, "")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "of another kernel source" not in text
    assert text.count("### tiny") >= 2 and "| 1 | 512/512/128 |" in text and "| 1 | 256/512/128 |" in text
    pictures = re.findall(r"\]\((roofline[^)]*)\)", text)
    assert len(set(pictures)) == len(pictures) == 2
    assert all((tmp_path / "out" / picture).exists() for picture in pictures)


def test_sweeps_of_the_same_sources_are_shown_as_one(
    run: Run, fill: Callable[[], Path], tmp_path: Path, make_trial: MakeTrial
) -> None:
    results = fill()
    mine = make_trial(workload="mine", block_sizes=BlockSizes(384, 512, 128), time_samples_ms=(1.125,))
    jsonl.append(results / "sweeps" / "mine-v6e" / "trials.jsonl", mine)
    run("output=out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "of another kernel source" not in text
    assert "| 1 | 384/512/128 |" in text and "| 2 | 512/512/128 |" in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("results_dir=", "results_dir='': expected a folder."),
        ("results_dir=nope", "results_dir=nope: expected a folder of records, as tuning.sweep writes them."),
        ("results_dir=/etc/passwd", "results_dir=/etc/passwd: expected a folder of records, as"),
        ("output=/dev/null", "output=/dev/null: cannot write to /dev/null (Not a directory); name another folder."),
        ("output=/proc/x", "output=/proc/x: cannot write to /proc/x ("),
        ("validation=nope", "validation=nope: expected what tuning.validate wrote, a file or a folder."),
        ("tuned_dir=nope", "tuned_dir=nope: expected a folder of tuned entries"),
    ],
)
def test_a_path_that_cannot_be_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str
) -> None:
    monkeypatch.setattr("tuning.report.inputs.Inputs", lambda *_: pytest.fail("work began"))
    code, out, err = run(argument)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
