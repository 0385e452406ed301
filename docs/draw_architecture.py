"""Draw the subpackages of the code and the imports between them: ``python docs/draw_architecture.py`` writes
images/architecture.svg.

Subpackages form layers, and a subpackage imports only from those below it. ``tests/test_house.py`` checks that, and
that the picture in the repository is the one that this script draws.
"""

import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
VERBS = "verbs"
# The subpackages of each package from the lowest to the highest; ``verbs`` are the files at the top of the package
# itself.
LAYERS: dict[str, tuple[str, ...]] = {
    "sources": ("files", "sidecars", "checkpoints", "adapters", "tensors", VERBS),
    "exporter": (
        "artifact",
        "publishing",
        "merging",
        "quantisation",
        "formats",
        "inspection",
        "planning",
        VERBS,
    ),
    "runtime": (
        "opening",
        "engine",
        "scheduling",
        "text",
        "backends",
        "model",
        "batching",
        "cluster",
        "evaluation",
        "comparison",
        "layout_view",
        "serving",
        "http",
        VERBS,
    ),
    "commands": ("shared", "terminal", VERBS),
    "compat": (VERBS,),
}
# What each package may import of the others; all of them import the contract, the files of pos2d/ itself.
BELOW: dict[str, tuple[str, ...]] = {
    "sources": (),
    "exporter": ("sources",),
    "runtime": ("sources",),
    "compat": ("sources", "runtime"),
    "commands": ("sources", "exporter", "runtime"),
}

# A package and one of its subpackages, or VERBS.
Place = tuple[str, str]


def sources(folder: str) -> list[Path]:
    """The Python files of a folder, each once: below ``pos2d`` the packages are links to the folders at the top."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in files if not any(parent.is_symlink() for parent in path.parents)]


def imports(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports: also inside functions, for type checkers alone, and by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield _start_of(node.args[0])
        elif isinstance(node, ast.Constant) and re.fullmatch(r"pos2d(\.\w+)+", str(node.value)):
            yield str(node.value)  # of a table of modules


def _start_of(name: ast.expr) -> str:
    """The literal beginning of a module's name, or nothing where it is computed."""
    first = name.values[0] if isinstance(name, ast.JoinedStr) else name
    return str(first.value).rstrip(".") if isinstance(first, ast.Constant) else ""


def place_of_module(module: str) -> Place | None:
    """Package and subpackage of an imported module, or nothing where it is not in one of our packages."""
    top, *parts = module.split(".")
    if top != "pos2d" or not parts or parts[0] not in LAYERS:
        return None
    package = parts[0]
    return package, parts[1] if len(parts) > 1 and (ROOT / package / parts[1]).is_dir() else VERBS


def place_of_file(path: Path) -> Place:
    package, *rest = path.relative_to(ROOT).parts
    return package, rest[0] if len(rest) > 1 else VERBS


def edges() -> dict[tuple[Place, Place], list[str]]:
    """Every import from one subpackage into another, with the files that make it; a package's ``__init__`` is its
    face."""
    found: dict[tuple[Place, Place], list[str]] = {}
    for package in LAYERS:
        for path in sources(package):
            here = place_of_file(path)
            for there in filter(None, map(place_of_module, imports(path))):
                if there != here and path != ROOT / package / "__init__.py":
                    found.setdefault((here, there), []).append(path.relative_to(ROOT).as_posix())
    return found


def is_allowed(here: Place, there: Place) -> bool:
    """Whether a subpackage may import from another: a lower one of its package, or one of a package below."""
    if here[0] != there[0]:
        return there[0] in BELOW[here[0]]
    order = LAYERS[here[0]]
    return order.index(there[1]) < order.index(here[1])


def purpose(place: Place) -> str:
    """The first line of the docstring of a subpackage."""
    folder = ROOT / place[0] if place[1] == VERBS else ROOT / place[0] / place[1]
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].rstrip(".") if text else ""


BOX, STEP, WIDTH, LEFT, TOP, LANE, GAP = 44, 54, 560, 24, 132, 17, 60
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
.page { fill: #ffffff }
.folder { fill: #f3f5f8; stroke: #d5dae1 }
.verbs { fill: #dcebff; stroke: #4393f0 }
.title { font-size: 17px; font-weight: 700 }
.name { font-size: 15px; font-weight: 600 }
.words { font-size: 12px; fill: #59636e }
.guide { stroke: #e4e8ed }
.lane { stroke: #4393f0; stroke-width: 1.5 }
.importer { fill: #4393f0 }
.imported { fill: #ffffff; stroke: #4393f0; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.page { fill: #0d1117 }
.folder { fill: #161b22; stroke: #30363d }
.verbs { fill: #14427c; stroke: #4393f0 }
.words { fill: #9aa4af }
.guide { stroke: #21262d }
.imported { fill: #0d1117 }
}
"""


def draw() -> str:
    """The picture as SVG: a stack of subpackages for each package, the highest on top.

    To the right of a stack every subpackage has a lane: a ring in its own row, and a dot in the row of each subpackage
    that imports it.
    """
    columns = ("exporter", "runtime")
    lanes = {package: LANE * len(LAYERS[package]) for package in columns}
    middle = TOP + STEP * max(len(LAYERS[package]) for package in columns)
    bottom = middle + 60 + STEP * len(LAYERS["sources"])
    width = 2 * LEFT + 2 * WIDTH + GAP + sum(lanes.values())
    height = bottom + 112
    parts = [
        _box(LEFT, 24, width - 2 * LEFT, "commands/, compat/", "The command line, and the trainer's two functions")
    ]
    x = LEFT
    for package in columns:
        parts += _stack(package, x, middle)
        x += WIDTH + lanes[package] + GAP
    parts += _stack("sources", LEFT, bottom)
    words = "The contract that all packages import: positions, layout, manifest, options, errors, names in artifacts"
    parts.append(_box(LEFT, bottom + 16, width - 2 * LEFT, "pos2d/", words))
    key = "In each stack the ring marks a subpackage, and the dots above it mark those that import it."
    parts.append(_text(LEFT, bottom + 88, key, "words"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'aria-label="The subpackages of the code and the imports between them">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}" rx="12"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _stack(package: str, x: int, bottom: int) -> Iterator[str]:
    """The subpackages of a package from the bottom up, with their lanes."""
    order = LAYERS[package]
    tops = {subpackage: bottom - STEP * (number + 1) for number, subpackage in enumerate(order)}
    yield _text(x, tops[order[-1]] - 14, f"{package}/", "title")
    for subpackage, top in tops.items():
        name = ", ".join(_verbs(package)) if subpackage == VERBS else f"{subpackage}/"
        yield _box(x, top, WIDTH, name, purpose((package, subpackage)), "verbs" if subpackage == VERBS else "folder")
        yield _line("guide", x + WIDTH, top + BOX // 2, x + WIDTH + LANE * len(order), top + BOX // 2)
    for number, subpackage in enumerate(order):
        importers = [a for (pa, a), (pb, b) in edges() if pa == pb == package and b == subpackage and a in tops]
        rows = [tops[importer] + BOX // 2 for importer in importers]
        lane, own = x + WIDTH + LANE * (number + 1), tops[subpackage] + BOX // 2
        if rows:
            yield _line("lane", lane, own, lane, min(rows))
            yield from (f'<circle class="importer" cx="{lane}" cy="{row}" r="4"/>' for row in rows)
            yield f'<circle class="imported" cx="{lane}" cy="{own}" r="4"/>'


def _line(kind: str, x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _verbs(package: str) -> list[str]:
    return [path.stem for path in sorted((ROOT / package).glob("*.py")) if path.stem != "__init__"]


def _box(x: int, y: int, width: int, name: str, words: str, kind: str = "folder") -> str:
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BOX}" rx="8"/>'
        + _text(x + 12, y + 18, name, "name")
        + _text(x + 12, y + 36, words, "words")
    )


def _text(x: int, y: int, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
