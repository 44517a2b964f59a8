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
    assert "~ from shorter kernels" in axes.get_xlabel()
