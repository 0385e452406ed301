"""A picture of a layout as SVG, without scripts or external files, in colours for light and dark pages."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from rich.cells import cell_len

from pos2d.runtime.layout_view.picture import Picture, PlacedToken, Row, bands, clipped, printable

PAGE = 1180  # wider pictures continue in another band, so that letters stay readable on a page
PAD = 24
TOP = 94
LETTER = 9  # the width of a character in the tokens' 15 px monospace
BOX, GAP = 46, 8
HEADER, STEP, BAND_GAP = 30, BOX + 12, 18
NARROWEST = 46
KEY = 610  # the width of the legend

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
.token text { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 15px }
.token text, .time { text-anchor: middle }
.token .small { font-size: 11px }
.headline { font-size: 19px; font-weight: 600 }
.words, .name { font-size: 14px }
.name { font-weight: 600 }
.branch, .time { font-size: 12.5px }
.words, .branch, .time { fill: #59636e }
.page { fill: #ffffff }
.row { fill: #f3f5f8 }
.token rect { stroke-width: 1.5; rx: 7px }
.seen rect { fill: #bfdcff; stroke: #4393f0 }
.seen text { fill: #0a3069 }
.unseen rect { fill: #ffffff; stroke: #d5dae1 }
.unseen text { fill: #818b98 }
.chosen rect { fill: #ffb63d; stroke: #a85500; stroke-width: 2.5 }
.chosen text { fill: #2b1600; font-weight: 700 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.words, .branch, .time { fill: #9aa4af }
.page { fill: #0d1117 }
.row { fill: #161b22 }
.seen rect { fill: #14427c; stroke: #4393f0 }
.seen text { fill: #dcebff }
.unseen rect { fill: #0d1117; stroke: #30363d }
.unseen text { fill: #7d8793 }
.chosen rect { fill: #ffb63d; stroke: #ffe0a6 }
.chosen text { fill: #2b1600 }
}
"""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Widths in pixels: ``head`` of the row labels, ``widths`` of the columns with their gaps, ``width`` of it all."""

    picture: Picture
    rows: list[Row]
    head: int
    widths: list[int]
    width: int


def draw_svg(picture: Picture) -> str:
    """The SVG file as text.

    Every token is a group of class ``seen``, ``unseen`` or ``chosen`` with its slot and positions as data attributes.
    """
    sheet = _measured(picture)
    parts = [
        _text(PAD, 42, picture.headline, "headline"),
        _text(PAD, 68, picture.rule, "words"),
    ]
    y = TOP
    for columns in bands(sheet.widths, sheet.width - 2 * PAD - sheet.head):
        rows = [row for row in sheet.rows if any(token.time in columns for token in row.tokens)]
        parts += _band(sheet, rows, columns, y)
        y += HEADER + STEP * len(rows) + BAND_GAP
    parts += _legend(y)
    parts += [_text(PAD, y + 54, picture.place, "words"), _text(PAD, y + 78, picture.facts, "words")]
    height = y + 78 + PAD
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {sheet.width} {height}" '
            f'width="{sheet.width}" height="{height}" role="img" aria-label="{escape(picture.headline)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{sheet.width}" height="{height}" rx="12"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _measured(picture: Picture) -> Sheet:
    """Columns are as wide as their widest token; the widths of other texts are estimated generously."""
    rows = picture.rows
    head = 26 + 9 * max(len(line) for row in rows for line in (row.name, f"branch {row.branch}"))
    widths = [NARROWEST + GAP] * picture.columns
    for token in picture.tokens:
        letters = max(cell_len(clipped(printable(token.text))), len(str(token.position)))
        widths[token.time] = max(widths[token.time], LETTER * letters + 18 + GAP)
    grid = max(sum(widths[time] for time in columns) for columns in bands(widths, PAGE - 2 * PAD - head))
    words = max(11 * cell_len(picture.headline), 8 * max(map(len, picture.lines[1:])))
    return Sheet(picture, rows, head, widths, 2 * PAD + max(head + grid, words, KEY))


def _band(sheet: Sheet, rows: list[Row], columns: range, y: int) -> Iterator[str]:
    """One band of columns: their times, and below them every row that has tokens in these columns."""
    starts, x = {}, PAD + sheet.head
    for time in columns:
        starts[time] = x
        x += sheet.widths[time]
    yield _text(PAD + 12, y + 18, "time →", "branch")
    for time, start in starts.items():
        yield _text(start + (sheet.widths[time] - GAP) // 2, y + 18, str(time), "time")
    for number, row in enumerate(rows):
        top = y + HEADER + STEP * number
        yield f'<rect class="row" x="{PAD}" y="{top - 4}" width="{x - PAD}" height="{BOX + 8}" rx="9"/>'
        yield _text(PAD + 12, top + 20, row.name, "name")
        yield _text(PAD + 12, top + 38, f"branch {row.branch}", "branch")
        for token in row.tokens:
            if token.time in columns:
                yield _token(token, sheet, starts[token.time], top)


def _token(token: PlacedToken, sheet: Sheet, x: int, y: int) -> str:
    kind = "chosen" if token.slot == sheet.picture.chosen else "seen" if token.visible else "unseen"
    width = sheet.widths[token.time] - GAP
    full_text = escape(printable(token.text))
    return (
        f'<g class="token {kind}" data-slot="{token.slot}" data-position="{token.position}" '
        f'data-branch="{token.branch}" data-time="{token.time}" data-owner="{token.owner}">'
        f"<title>{full_text}: position {token.position}, branch {token.branch}, time {token.time}</title>"
        f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}"/>'
        f'<text x="{x + width // 2}" y="{y + 21}">{escape(clipped(printable(token.text)))}</text>'
        f'<text class="small" x="{x + width // 2}" y="{y + 38}">{token.position}</text></g>'
    )


def _legend(y: int) -> Iterator[str]:
    """The meaning of the colours; its boxes have the classes of tokens."""
    x = PAD
    for kind, words in (("chosen", "chosen token"), ("seen", "visible to it"), ("unseen", "not visible")):
        yield f'<g class="token {kind}"><rect x="{x}" y="{y + 8}" width="24" height="18"/></g>'
        yield _text(x + 34, y + 22, words, "words")
        x += 34 + 8 * len(words) + 14
    yield _text(x, y + 22, "small number: position", "words")


def _text(x: int, y: int, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'
