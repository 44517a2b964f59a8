"""Draw who imports whom, from the real imports, to docs/pictures/architecture.svg: `python tests/architecture.py`."""

import dataclasses
import graphlib
import statistics
from collections.abc import Iterable, Iterator
from html import escape

from folders import FOLDERS, PACKAGES, ROOT, folder_of, imported_folders, imported_modules

PICTURE = ROOT / "docs/pictures/architecture.svg"
PACK = "comfyui"
WIDTH = 1180
#: Pixels above, below and between packages.
MARGIN, BETWEEN = 20, 54
#: Pixels between the tops of two rows of folders, a folder's size, and a package's edge and heading.
ROW, FOLDER_WIDTH, FOLDER_HEIGHT, EDGE, HEADING = 48, 118, 26, 12, 28


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle, in pixels from the upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a package stands: colour (Okabe and Ito's), left side and width in pixels, and the packages under it."""

    colour: str
    x: float
    width: float
    under: tuple[str, ...] = ()


#: What imports stands above what it imports.
PLACES = {
    PACK: Place("#cc79a7", 640, 520, ("pipeline",)),
    "tuning": Place("#0072b2", 20, 570, ("offline_tpu", "splash_attn")),
    "pipeline": Place("#d55e00", 640, 520, ("offline_tpu", "splash_attn")),
    "offline_tpu": Place("#009e73", 390, 520, ("splash_workbench",)),
    "splash_workbench": Place("#666666", 270, 890),
    "splash_attn": Place("#b58900", 20, 200),
}
#: Where the arrow from one package to another leaves and arrives, from the left, clear of the other packages. Packages
#: that are further apart have dots only.
LANES = {
    (PACK, "pipeline"): (900, 900),
    ("tuning", "splash_attn"): (80, 80),
    ("tuning", "splash_workbench"): (330, 330),
    ("tuning", "offline_tpu"): (490, 490),
    ("pipeline", "offline_tpu"): (800, 800),
    ("pipeline", "splash_workbench"): (1040, 1040),
    ("pipeline", "splash_attn"): (680, 160),
    ("offline_tpu", "splash_workbench"): (650, 650),
}


def imports() -> dict[str, set[str]]:
    """Return for each folder the others that it imports from."""
    pack = {module for path in (ROOT / PACK).rglob("*.py") for module in imported_modules(path)}
    of_pack = {folder_of(module) for module in pack if module.partition(".")[0] in PACKAGES}
    return {folder: imported_folders(folder) for folder in FOLDERS} | {PACK: of_pack}


def package_of(folder: str) -> str:
    """Return the first part of a dotted name."""
    return folder.partition(".")[0]


def within(package: str, all_imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what the folders of a package import from one another, less what follows from other imports."""
    folders = {folder for folder in all_imports if package_of(folder) == package}
    return without_detours({folder: all_imports[folder] & folders for folder in all_imports if folder in folders})


def without_detours(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the edges that do not follow from others. Raises CycleError, which names the folders of a cycle."""
    graphlib.TopologicalSorter(edges).prepare()

    def reached(folder: str) -> set[str]:
        return {folder}.union(*(reached(below) for below in edges[folder]))

    return {
        folder: {below for below in belows if not any(below in reached(other) for other in belows - {below})}
        for folder, belows in edges.items()
    }


def rows(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the folders from the ground up, each in the lowest row above all that it imports from."""

    def depth(folder: str) -> int:
        return 1 + max((depth(below) for below in edges[folder]), default=-1)

    found: list[list[str]] = [[] for _ in range(1 + max(map(depth, edges)))]
    for folder in edges:
        found[depth(folder)].append(folder)
    return found


def laid_out(all_imports: dict[str, set[str]]) -> dict[str, Box]:
    """Return the boxes of packages, with a slash after their name, and of folders. The ground is at y = 0."""
    boxes: dict[str, Box] = {}
    for package, place in reversed(PLACES.items()):
        bottom = min((boxes[f"{below}/"].y - BETWEEN for below in place.under), default=0)
        edges = within(package, all_imports)
        for number, row in enumerate(rows(edges)):
            if number:  # above what they import from: fewer arrows cross
                row.sort(key=lambda folder: statistics.mean(boxes[below].middle for below in edges[folder]))
            step = (place.width - 2 * EDGE) / len(row)
            y = bottom - EDGE - FOLDER_HEIGHT - number * ROW
            for column, folder in enumerate(row):
                x = place.x + EDGE + step * (column + 0.5) - FOLDER_WIDTH / 2
                boxes[folder] = Box(x, y, FOLDER_WIDTH, FOLDER_HEIGHT)
        boxes[f"{package}/"] = Box(place.x, y - HEADING, place.width, bottom - y + HEADING)
    return boxes


def arrow(points: Iterable[tuple[float, float]], colour: str, width: float) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
        f'marker-end="url(#{colour[1:]})"/>'
    )


def text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(content)}</text>'


def rectangle(box: Box, colour: str, fill: str, radius: int) -> str:
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="{radius}" '
        f'stroke="{colour}" {fill}/>'
    )


def draw_package(package: str, all_imports: dict[str, set[str]], boxes: dict[str, Box]) -> Iterator[str]:
    """Yield a package: its folders, the arrows between them, and a dot for each other package that one imports from."""
    colour = PLACES[package].colour
    edges, place = within(package, all_imports), boxes[f"{package}/"]
    yield rectangle(place, colour, f'fill="{colour}" fill-opacity="0.08"', 8)
    yield text(place.x + EDGE, place.y + 20, f"{package}/", f'font-size="15" font-weight="bold" fill="{colour}"')
    for folder, belows in edges.items():
        for below in sorted(belows):
            start, end = boxes[folder], boxes[below]
            yield arrow([(start.middle, start.bottom), (end.middle, end.y - 3)], colour, 1.2)
    for folder in edges:
        box = boxes[folder]
        yield rectangle(box, colour, 'fill="white"', 5)
        name = folder.partition(".")[2]
        yield text(box.x + 7, box.y + 18, f"{name}/" if name else "nodes" if folder == PACK else "*.py")
        others = [other for other in PLACES if other != package and other in map(package_of, all_imports[folder])]
        for number, other in enumerate(reversed(others)):
            x, y = box.x + box.width - 8 - 10 * number, box.y + box.height / 2
            yield f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{PLACES[other].colour}"/>'


def draw_lanes(all_imports: dict[str, set[str]], boxes: dict[str, Box]) -> Iterator[str]:
    """Yield the arrows of LANES, each only if the one package does import from the other."""
    edges = {(package_of(above), package_of(below)) for above in all_imports for below in all_imports[above]}
    for (above, below), (start, end) in LANES.items():
        if (above, below) in edges:
            top, bottom = boxes[f"{above}/"].bottom, boxes[f"{below}/"].y
            turns = [(start, top + 18), (end, top + 18)] if start != end else []
            yield arrow([(start, top), *turns, (end, bottom - 5)], PLACES[above].colour, 3)


def svg() -> str:
    """Return the picture: the same text for the same imports."""
    all_imports = imports()
    boxes = laid_out(all_imports)
    top = min(box.y for box in boxes.values()) - MARGIN
    markers = "".join(
        f'<marker id="{place.colour[1:]}" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="4.5" markerHeight="4.5" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{place.colour}"/></marker>'
        for place in PLACES.values()
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top:g} {WIDTH} {MARGIN - top:g}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">',
        f"<defs>{markers}</defs>",
        f'<rect y="{top:g}" width="{WIDTH}" height="{MARGIN - top:g}" fill="white"/>',
        text(20, top + 40, "Every import points down.", 'font-size="17" font-weight="bold"'),
        text(20, top + 66, "An arrow leads from what imports to what is imported."),
        text(20, top + 84, "Inside a package, arrows that follow from others are left out."),
        text(20, top + 106, "A dot: the folder imports from the package of that colour."),
        *draw_lanes(all_imports, boxes),
        *(line for package in PLACES for line in draw_package(package, all_imports, boxes)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg())
