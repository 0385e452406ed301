"""A picture of a layout as lines for a terminal, readable without colours."""

from rich.cells import cell_len
from rich.text import Text

from pos2d.runtime.layout_view.picture import Picture, PlacedToken, Row, bands, clipped, shown

CHOSEN, SEEN, UNSEEN, QUIET = "bold black on yellow", "bold cyan", "dim", "dim"
GAP = 2
LONGEST = 20


def draw_text(picture: Picture, width: int) -> Text:
    """Blocks of columns that fit ``width`` cells, then what they show in words.

    Of every token the first line has the text, in brackets where it is the chosen one, after ● where that one sees it
    and after ○ where not; the second line has its position.
    """
    rows = picture.rows
    head = max(len(line) for row in rows for line in _head(row)) + GAP
    room = max(1, min(LONGEST, width - head - 2))
    widths = [len(str(time)) + 2 for time in range(picture.columns)]
    for token in picture.tokens:
        inside = max(cell_len(clipped(shown(token.text), room)), len(str(token.position)))
        widths[token.time] = max(widths[token.time], inside + 2)
    lines = []
    for columns in bands([wide + GAP for wide in widths], width - head + GAP):
        lines.append(_line("time", QUIET, {time: (f"  {time}", QUIET) for time in columns}, head, widths))
        for row in rows:
            own = {token.time: token for token in row.tokens if token.time in columns}
            if own:
                texts = {time: _marked(token, picture.chosen, room) for time, token in own.items()}
                positions = {time: (f"  {token.position}", QUIET) for time, token in own.items()}
                name, branch = _head(row)
                lines.append(_line(name, "bold", _full(texts, columns), head, widths))
                lines.append(_line(branch, QUIET, _full(positions, columns), head, widths))
        lines.append(Text())
    key = "[ ] chosen   ● seen   ○ not seen   below: position"
    lines += _wrapped(key, QUIET, width)
    for number, words in enumerate(picture.lines):
        lines += _wrapped(words, "" if number else "bold", width)
    return Text("\n").join(lines)


def _head(row: Row) -> tuple[str, str]:
    return row.name, f"branch {row.branch}"


def _marked(token: PlacedToken, chosen: int, room: int) -> tuple[str, str]:
    text = clipped(shown(token.text), room)
    if token.slot == chosen:
        return f"[{text}]", CHOSEN
    return (f"● {text}", SEEN) if token.visible else (f"○ {text}", UNSEEN)


def _full(cells: dict[int, tuple[str, str]], columns: range) -> dict[int, tuple[str, str]]:
    return {time: cells.get(time, ("", "")) for time in columns}


def _line(name: str, style: str, cells: dict[int, tuple[str, str]], head: int, widths: list[int]) -> Text:
    """One line: a head, then the cells of a block's columns, each as wide as its column."""
    line = Text.assemble((name, style), " " * (head - len(name)))
    for time, (text, look) in cells.items():
        line.append(text, look).append(" " * (widths[time] - cell_len(text) + GAP))
    line.rstrip()
    return line


def _wrapped(words: str, style: str, width: int) -> list[Text]:
    """Lines of whole words, the later ones indented."""
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
        if cell_len(longer) > width and lines[-1].strip():
            longer = f"  {word}"
            lines.append("")
        lines[-1] = longer
    return [Text(line.rstrip(), style) for line in lines]
