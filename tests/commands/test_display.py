"""Panels: while answers grow their ends are shown, and in the end everything."""

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from pos2d.commands.terminal.panels import Display
from pos2d.runtime.text.completions import Event

WORDS = [f"word{number}" for number in range(60)]


def drawn(display: Any, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    display._console = console
    with console.capture() as captured:
        console.print(display._panels())
    return captured.get().splitlines()


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    made = Display(["a question", "a long question that does not fit its panel " * 3, "third"])
    for branch in range(3):
        for word in WORDS:
            made.show(Event(branch, 1, f"{word} "))
    return made


@pytest.mark.parametrize(("width", "height"), [(100, 12), (70, 14), (34, 15)])
def test_while_answers_grow_their_ends_fit_the_window(display: Any, width: int, height: int) -> None:
    lines = drawn(display, width, height)
    assert len(lines) <= height
    text = "\n".join(lines)
    assert text.count("word59") == 3
    assert "word0 " not in text
    assert all(len(line) <= width for line in lines)
    assert "…" in text  # of the long question


def test_the_last_picture_is_whole(display: Any) -> None:
    display._unclipped = True
    text = "\n".join(drawn(display, 70, 10))
    for word in WORDS:
        assert text.count(f"{word} ") == 3
