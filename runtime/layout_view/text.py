"""A picture of a layout as text for a terminal, readable without colours."""

from rich.cells import cell_len
from rich.text import Text

from pos2d.runtime.layout_view.picture import Picture, PlacedToken, Row, bands, clipped, printable

CHOSEN, SEEN, UNSEEN, FAINT = "bold black on yellow", "bold cyan", "dim", "dim"
GAP = 2
LONGEST = 20


def draw_text(picture: Picture, width: int) -> Text:
    """Bands of columns that fit ``width`` cells, then sentences about what they show.

    A token takes two lines. The first has its text, in brackets for the chosen token, after ● for one that the chosen
    token attends to, and after ○ for any other; the second has its position.
    """
    rows = picture.rows
    head = max(len(line) for row in rows for line in _head(row)) + GAP
    room = max(1, min(LONGEST, width - head - 2))
    widths = [len(str(time)) + 2 for time in range(picture.columns)]
    for token in picture.tokens:
        inside = max(cell_len(clipped(printable(token.text), room)), len(str(token.position)))
        widths[token.time] = max(widths[token.time], inside + 2)
    lines = []
    for columns in bands([wide + GAP for wide in widths], width - head + GAP):
        lines.append(_line("time", FAINT, {time: (f"  {time}", FAINT) for time in columns}, head, widths))
        for row in rows:
            in_band = {token.time: token for token in row.tokens if token.time in columns}
            if in_band:
                texts = {time: _marked(token, picture.chosen, room) for time, token in in_band.items()}
                positions = {time: (f"  {token.position}", FAINT) for time, token in in_band.items()}
                name, branch = _head(row)
                lines.append(_line(name, "bold", _filled(texts, columns), head, widths))
                lines.append(_line(branch, FAINT, _filled(positions, columns), head, widths))
        lines.append(Text())
    legend = "[ ] chosen   ● visible to it   ○ not visible   below: position"
    lines += _wrapped(legend, FAINT, width)
    for number, words in enumerate(picture.lines):
        lines += _wrapped(words, "" if number else "bold", width)
    return Text("\n").join(lines)


def _head(row: Row) -> tuple[str, str]:
    return row.name, f"branch {row.branch}"


def _marked(token: PlacedToken, chosen: int, room: int) -> tuple[str, str]:
    text = clipped(printable(token.text), room)
    if token.slot == chosen:
        return f"[{text}]", CHOSEN
    return (f"● {text}", SEEN) if token.visible else (f"○ {text}", UNSEEN)


def _filled(cells: dict[int, tuple[str, str]], columns: range) -> dict[int, tuple[str, str]]:
    return {time: cells.get(time, ("", "")) for time in columns}


def _line(name: str, style: str, cells: dict[int, tuple[str, str]], head: int, widths: list[int]) -> Text:
    """One line: the row's label, then the cells of a band's columns, each as wide as its column."""
    line = Text.assemble((name, style), " " * (head - len(name)))
    for time, (text, look) in cells.items():
        line.append(text, look).append(" " * (widths[time] - cell_len(text) + GAP))
    line.rstrip()
    return line


def _wrapped(words: str, style: str, width: int) -> list[Text]:
    """Lines of whole words; all but the first are indented."""
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
        if cell_len(longer) > width and lines[-1].strip():
            longer = f"  {word}"
            lines.append("")
        lines[-1] = longer
    return [Text(line.rstrip(), style) for line in lines]
