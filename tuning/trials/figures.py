"""Colours and axes that all pictures share, and how one is saved."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from splash_workbench.files import atomic_path

#: CSS variable -> (light, dark); kernels are coloured in the order of c1, c2, ... Okabe and Ito's palette, which keeps
#: its differences for colour-blind eyes, lighter on dark ground.
COLOURS = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#59636e", "#9aa4af"),
    "line": ("#d5dae0", "#3a424b"),
    "paper": ("#ffffff", "#14181d"),
    "c1": ("#0072b2", "#4ba3e3"),
    "c2": ("#d55e00", "#f08a3c"),
    "c3": ("#009e73", "#2fc49a"),
    "c4": ("#b8860b", "#e6c04d"),
    "c5": ("#a8518a", "#d98fbd"),
    "c6": ("#6b7480", "#8b95a1"),
}
#: What a figure is drawn in. In an SVG of a page these become CSS variables, which follow it into dark mode.
LIGHT = {name: light for name, (light, _) in COLOURS.items()}


def log_axes(axes: Axes, ticks: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Make both axes logarithmic, with a grid and ticks at these multiples of every power of ten."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.label.set_color(LIGHT["muted"])
    axes.grid(True, color=LIGHT["line"], lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(LIGHT["line"])
    axes.tick_params(colors=LIGHT["muted"], length=0)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
