"""Parts of the models on small arrays: compiling them takes most of a test's time, running them little."""

from collections.abc import Iterator

import pytest

from helpers import compiling_in_haste


@pytest.fixture(scope="module", autouse=True)
def in_haste() -> Iterator[None]:
    """Compile without XLA's optimizations: a sixth to a quarter of the time of these tests."""
    with compiling_in_haste():
        yield
