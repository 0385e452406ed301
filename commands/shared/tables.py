"""Tables as plain text, as wide as their content: nothing is cut or wrapped, on a terminal or in a file."""

import re
from collections.abc import Iterable, Sequence
from io import StringIO

GAP = 2
WIDEST = 1_000_000
# A number; a percent sign, or a space and a unit or an error, may follow. Versions, such as 2.13.0, are not numbers.
NUMBER = re.compile(r"([-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?|nan|inf)%?( .*)?")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines with the cells of every row below ``head``, which is empty for a table without one.

    A column of numbers is aligned right, any other column left; - and empty cells are no numbers. Without rich, cells
    are separated but not aligned.
    """
    cells = [list(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # `doctor` says so, and has to work until then
        return "\n".join((" " * GAP).join(row).rstrip() for row in ([list(head)] if head else []) + cells)

    grid = Table(box=None, show_header=bool(head), header_style="", pad_edge=False, padding=(0, GAP, 0, 0))
    for number, column in enumerate(zip(*cells, strict=True) if cells else [()] * len(head)):
        name = head[number] if head else ""
        grid.add_column(Text(name), justify="right" if _is_numeric(column) else "left", no_wrap=True)
    for row in cells:
        grid.add_row(*map(Text, row))
    console = Console(file=StringIO(), width=WIDEST, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(NUMBER.fullmatch(cell) for cell in filled)
