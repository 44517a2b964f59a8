"""The picture of a sweep."""

from collections.abc import Callable

from splash_attn.types import BlockSizes
from tuning.trials import heatmap
from tuning.trials.records import Trial


def test_a_cell_shows_an_estimate_only_where_nothing_was_settled(make_trial: Callable[..., Trial]) -> None:
    def trial(block_q: int, time_ms: float, compiled: str, **variant: object) -> Trial:
        fields = {"block_sizes": BlockSizes(block_q, 512, 256), "variant": variant, "compiled": compiled}
        return make_trial(**fields, time_samples_ms=(time_ms,))

    figure = heatmap.draw(
        [
            trial(256, 10.5, "shorter", lookahead=2),
            trial(256, 11.5, "whole", lookahead=3),
            trial(512, 12.5, "shorter", lookahead=2),
        ]
    )
    assert figure is not None
    (axes, *_) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"11.5\n/256", "~12.5\n/256"}
    assert [patch.get_edgecolor()[:3] for patch in axes.patches] == [(1.0, 0.0, 0.0)]  # the winner's frame
    assert "11.500 ms" in axes.get_title()
    assert "~ from a shorter kernel" in axes.get_xlabel()


def test_exact_and_inexact_have_a_picture_each() -> None:
    for names in (heatmap.ATTENTION, ("block_q", "lookahead")):
        assert heatmap.file_name(True, names) != heatmap.file_name(False, names)


def test_another_kernels_blocks_are_named_as_its_own(make_trial: Callable[..., Trial]) -> None:
    """Its tunables may be called as attention's are; it may be timed on a chip of a long name."""
    kernel = {"kernel": "Mine", "workload": "Mine-batch_size1-seq_len39936-num_heads12-head_dim64", "shape": None}
    trials = [
        make_trial(
            **kernel,
            block_sizes=None,
            variant={"block_q": 64, "block_kv": 128},
            device="gpu",
            device_kind="NVIDIA H100 80GB HBM3",
            time_samples_ms=(9.5,),
        )
    ]
    figure = heatmap.draw(trials)
    assert figure is not None
    (axes, *_) = figure.axes
    assert axes.get_xlabel() == "block_kv (in the cell: ms)"
    assert "H100" in axes.get_title()
    assert max(map(len, axes.get_title().splitlines())) <= 84  # what the narrowest picture holds
