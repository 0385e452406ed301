"""A picture of the KL at every step of the greedy answers as SVG, in colours for light and dark pages."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from pos2d.runtime.comparison.report import CompareReport

WIDTH, HEIGHT, LEFT, TOP, RIGHT, ROW = 900, 340, 84, 66, 24, 24
# Values below it are drawn as if they were as large: float32 cannot tell them from 0.
LOWEST = 1e-10
# Line colours that can be told apart on both pages, also by most people who see few colours; then dashes.
COLOURS = ("#2f81f7", "#d1690e", "#2da44e", "#bf3989", "#8250df", "#9a6700")
DASHES = ("", "7 4", "2 3")
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
.headline { font-size: 18px; font-weight: 600 }
.words { font-size: 13px; fill: #59636e }
.value { text-anchor: end }
.page { fill: #ffffff }
.guide { stroke: #e4e8ed }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.words { fill: #9aa4af }
.page { fill: #0d1117 }
.guide { stroke: #21262d }
}
"""
Series = tuple[str, Sequence[float]]


def draw_steps(report: CompareReport) -> str:
    """The SVG file as text: a line for every artifact, on a logarithmic scale."""
    series = [(artifact.figures.name, artifact.kl_by_step) for artifact in report.artifacts if artifact.kl_by_step]
    values = [max(value, LOWEST) for _, line in series for value in line] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    steps = max((len(line) for _, line in series), default=1)
    bottom = TOP + HEIGHT
    height = bottom + 56 + ROW * len(series)
    title = "KL from the unmerged model at every step of its greedy answers"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-label="{escape(title)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="12"/>',
            _text(24, 36, title, "headline"),
            _text(24, 56, f"nats a token, the mean of {len(report.prompts)} answers; {report.text}", "words"),
            *_scale(low, high),
            *_steps(steps),
            *(_line(number, line, low, high, steps) for number, (_, line) in enumerate(series)),
            *(_key(number, name, bottom + 52 + ROW * number) for number, (name, _) in enumerate(series)),
            "</svg>\n",
        ]
    )


def _scale(low: int, high: int) -> Iterator[str]:
    """A horizontal line for every power of ten."""
    for power in range(low, high + 1):
        y = _y(10.0**power, low, high)
        yield f'<line class="guide" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield _text(LEFT - 10, y + 4, f"1e{power}" if power else "1", "words value")


def _steps(steps: int) -> Iterator[str]:
    """The numbers of about eight steps, from 1."""
    every = max(1, math.ceil(steps / 8))
    for step in range(0, steps, every):
        yield _text(_x(step, steps), TOP + HEIGHT + 20, str(step + 1) if step else "step 1", "words")


def _line(number: int, values: Sequence[float], low: int, high: int, steps: int) -> str:
    points = " ".join(f"{_x(step, steps):.1f},{_y(value, low, high):.1f}" for step, value in enumerate(values))
    return f'<polyline class="line" {_stroke(number)} points="{points}"/>'


def _key(number: int, name: str, y: float) -> str:
    line = f'<line class="line" {_stroke(number)} x1="{LEFT}" y1="{y - 4:.1f}" x2="{LEFT + 36}" y2="{y - 4:.1f}"/>'
    return line + _text(LEFT + 46, y, name, "words")


def _stroke(number: int) -> str:
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _x(step: int, steps: int) -> float:
    return LEFT + (WIDTH - RIGHT - LEFT) * step / max(1, steps - 1)


def _y(value: float, low: int, high: int) -> float:
    share = (math.log10(max(value, LOWEST)) - low) / (high - low)
    return TOP + 8 + (HEIGHT - 8) * (1 - share)


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'
