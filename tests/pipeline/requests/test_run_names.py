"""Names of runs."""

import pytest

from pipeline.requests.errors import RequestError
from pipeline.requests.run_names import run_name

#: Formats whose text would fill the memory.
WIDE = (
    "{seed:>9999999999}",
    "{seed:010000}",
    "{guidance_scale:.999999999f}",
    "{seed:{seed}}",
    "{seed:c}",
    "{fps:>201}",
)


def test_names_of_runs(request_of):
    assert run_name(request_of(prompt="a cat"), "{line:03d} {slug} {seed}", 4) == "004 a-cat 7"
    for name in (
        "",
        ".",
        "..",
        "a/b",
        "/etc",
        "x" * 300,
        "{prompt}",
        "{seed",
        "{seed.real}",
        "{}",
        "{slug:d}",
        3,
        *WIDE,
    ):
        with pytest.raises(RequestError, match="name="):
            run_name(request_of(seed=2**40), name)
    name = run_name(request_of(prompt="A cat, on a mat!"))
    assert name.startswith("a-cat-on-a-mat-80x48x9-seed7-")
    assert run_name(request_of(prompt="日本")).startswith("video-80x48x9")
    assert run_name(request_of(prompt="x" * 500)) != run_name(request_of(prompt="x" * 501))
    assert run_name(request_of(fps=30)) == run_name(request_of())
    assert run_name(request_of(guidance_scale=2.0)) != run_name(request_of())
