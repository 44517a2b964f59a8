"""Pictures of the page as SVG, with text as text, and the one that is only here: a roofline.

Colours are names of CSS variables, so that a picture follows the page into dark mode; alone it brings its own.
"""

import dataclasses
import html
import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from offline_tpu.machine.devices import DeviceSpec
from tuning.trials.figures import COLOURS, LIGHT, log_axes

_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclasses.dataclass(frozen=True)
class Point:
    """A kernel on a roofline: FLOPs of the attention a byte of the kernel's HBM traffic, and in the kernel's time.

    kernel: gives colour and marker; text: for the reader who points at it; label: beside it, None for one of many.
    """

    kernel: str
    text: str
    intensity: float
    tflops_per_s: float
    label: str | None


def roofline(
    name: str,
    points: Sequence[Point],
    kernels: Sequence[str],
    device: DeviceSpec,
    mxu_tflops_per_s: float | None,
    mxu_label: str,
) -> str:
    """Return an SVG of the points under the roofs of a device; kernels: in the order of their colours.

    name: makes its ids differ from those of another; mxu_tflops_per_s: of this head_dim, None where unknown.
    """
    peak, hbm = device.peak_bf16_flops_per_s / 1e12, device.hbm_bytes_per_s / 1e12
    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    ridge = peak / hbm
    left = min([ridge / 6, *(point.intensity / 3 for point in points)])
    right = max([ridge * 20, *(point.intensity * 2 for point in points)])
    bottom = min(point.tflops_per_s for point in points) / 2.5
    ink, muted = LIGHT["ink"], LIGHT["muted"]
    axes.plot([left, ridge, right], [left * hbm, peak, peak], color=ink, lw=1.6)
    mxu = mxu_tflops_per_s
    at_peak = mxu is not None and mxu > 0.97 * peak
    beside_line: dict[str, Any] = {"xytext": (-3, 4), "textcoords": "offset points", "ha": "right", "color": muted}
    axes.annotate(f"{mxu_label if at_peak else 'MXU peak, bf16'}: {peak:.0f}", (right, peak), **beside_line)
    if mxu is not None and not at_peak:
        axes.plot([mxu / hbm, right], [mxu] * 2, color=ink, lw=1.2, ls=(0, (4, 3)))
        axes.annotate(f"{mxu_label}: {mxu:.0f}", (right, mxu), **beside_line)
    x = max(left, bottom / hbm) * 1.5
    axes.annotate(f"HBM {hbm:.2f} TB/s", (x, x * hbm), (7, -3), textcoords="offset points", color=muted)
    titles = {}
    for number, point in enumerate(sorted(points, key=lambda point: point.label is not None)):
        index = kernels.index(point.kernel)
        gid = f"{name}-{number}"
        titles[gid] = point.text
        axes.plot(
            point.intensity,
            point.tflops_per_s,
            marker=_MARKERS[index % len(_MARKERS)],
            ms=8 if point.label else 4.5,
            alpha=1 if point.label else 0.45,
            color=LIGHT[f"c{index % 5 + 1}"],
            mec=LIGHT["paper"],
            mew=0.8,
            ls="none",
            gid=gid,
        )
    _label([point for point in points if point.label], axes, kernels)
    log_axes(axes)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, peak * 1.8)
    axes.set_xlabel("arithmetic intensity, FLOP a byte of HBM traffic")
    axes.set_ylabel("TFLOP/s")
    return to_svg(figure, name, titles)


def _label(points: Sequence[Point], axes: Axes, kernels: Sequence[str]) -> None:
    """Write names below the points, one line lower for each that would stand on the one before."""
    line = 0
    centred: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top"}
    ordered = sorted(points, key=lambda point: (-point.tflops_per_s, point.intensity))
    for point, previous in zip(ordered, [None, *ordered], strict=False):
        near = (
            previous is not None
            and point.tflops_per_s > previous.tflops_per_s / 1.5
            and max(point.intensity, previous.intensity) < 4 * min(point.intensity, previous.intensity)
        )
        line = line + 1 if near else 0
        colour = LIGHT[f"c{kernels.index(point.kernel) % 5 + 1}"]
        at = (point.intensity, point.tflops_per_s)
        axes.annotate(point.label or "", at, (0, -7 - 12 * line), color=colour, **centred)


def standalone(svg: str) -> str:
    """Return the picture as a file of its own, with its colours in light and in dark."""
    style = (
        f"<style>svg{{{css(0)} background:var(--paper)}}text{{font-family:system-ui,sans-serif;"
        "paint-order:stroke;stroke:var(--paper);stroke-width:3px}"
        f"@media (prefers-color-scheme:dark){{svg{{{css(1)}}}}}</style>"
    )
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, svg, count=1) + "\n"


def css(mode: int) -> str:
    """Return declarations of the colours, light (0) or dark (1)."""
    return " ".join(f"--{name}: {pair[mode]};" for name, pair in COLOURS.items())


def to_svg(figure: Figure, name: str, titles: dict[str, str]) -> str:
    """Return a figure in the colours of LIGHT as an SVG element, its colours as CSS variables, without date and size.

    name: makes its ids differ from those of another; titles: id of an element -> text for the reader who points at it.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?|; font-family: [^;\"]*", "", svg)
    for variable, light in LIGHT.items():
        svg = svg.replace(light, f"var(--{variable})")
    for gid, text in titles.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{html.escape(text)}</title>', 1)
    return re.sub(r'id="((?:figure|axes|patch|line2d|text|matplotlib|FillBetween|xtick|ytick)[^"]*)"', "", svg)
