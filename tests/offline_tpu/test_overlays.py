"""How the overlay graph is read, and what a loop that spans pieces of code loads."""

import re

import pytest

from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.overlays import BUNDLE_BYTES, Loads, Overlays, read_overlays

ONE = """digraph {
  "#0:prelude def:#1 size:320" -> "#1:tlp def:n/a size:63096 <exit>"
}
"""
# A conditional; and pieces of single ops, called from the program.
SEVERAL = """digraph {
  "#0:prelude def:#1 size:304" -> "#1:tlp def:#2 size:22528"
  "#1:tlp def:#2 size:22528" -> "#2:tlp def:#3 size:5408"
  "#1:tlp def:#2 size:22528" -> "#3:tlp def:#1 size:560 <exit>"
  "#2:tlp def:#3 size:5408" -> "#3:tlp def:#1 size:560 <exit>"
  "#3:tlp def:#1 size:560 <exit>" -> "#4:hlo def:n/a size:216"
}
"""
# A kernel of 943 bundles, 900 of them a loop.
CYCLE = """digraph {
  "#0:prelude def:#1 size:8" -> "#1:tlp def:#2 size:16"
  "#1:tlp def:#2 size:16" -> "#2:tlp def:#3 size:400"
  "#1:tlp def:#2 size:16" -> "#4:tlp def:#1 size:24 <exit>"
  "#2:tlp def:#3 size:400" -> "#3:tlp def:#2 size:560"
  "#3:tlp def:#2 size:560" -> "#2:tlp def:#3 size:400"
  "#3:tlp def:#2 size:560" -> "#4:tlp def:#1 size:24 <exit>"
}
"""


@pytest.mark.parametrize(
    ("text", "sizes", "loops"),
    [
        (ONE, [320, 63096], ()),
        (SEVERAL, [304, 22528, 5408, 560, 216], ()),
        (CYCLE, [8, 16, 400, 560, 24], ((2, 3),)),
    ],
)
def test_pieces_and_loops_of_a_graph(text, sizes, loops):
    actual = Overlays.parse(text)
    assert actual.sizes == dict(enumerate(sizes))
    assert actual.loops == loops
    assert actual.code_bytes == sum(sizes) * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "digraph {\n}\n",
        ONE.replace("digraph", "graph"),
        ONE.replace("size:320", "size:many"),
        ONE.replace("prelude", "sequel"),
        ONE.replace(" -> ", " -- "),
        ONE.replace("}", ""),
    ],
)
def test_another_form_is_refused(text, tmp_path):
    path = tmp_path / "1-TLP-03-overlay-graph.txt"
    path.write_text(text)
    with pytest.raises(UnknownDumpFormatError, match=re.escape(f"{path.name}: expected ")):
        read_overlays(path)


def test_a_loop_of_several_pieces_loads_all_of_them_in_each_trip():
    loop = [8] * 900
    loop[600:800] = [800] * 200  # a loop within the second piece
    actual = Overlays.parse(CYCLE).loads([1] * 3 + loop + [1] * 40)
    assert actual == Loads((400, 560), 8)
    assert actual.time_s(1e9, 1e-6) == pytest.approx(8 * (960 * BUNDLE_BYTES / 1e9 + 2e-6))


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (ONE, [1] * 8 + [8] * 62472),  # a loop that is one piece
        (CYCLE, [1] * 943),  # one trip
        (CYCLE, [8] * 3000),  # the loop of a shorter op
        (CYCLE, []),
    ],
)
def test_an_op_that_loads_nothing_anew(text, counts):
    assert Overlays.parse(text).loads(counts) is None
