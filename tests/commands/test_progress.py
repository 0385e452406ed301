"""Progress: the library shows nothing of its own accord, and the command line draws bars on a terminal only."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pos2d.commands.shared.progress_bars import ProgressLines, progress_display
from pos2d.progress import Progress, show_with
from tests.terminal import shown_on_terminal

ROOT = Path(__file__).parent.parent.parent
BARS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pos2d.commands.shared.progress_bars import progress_display
from pos2d.progress import Progress, show_with
show_with(progress_display)
with Progress("writing", 10, "bytes") as progress:
    progress.advance(10, "a note")
"""


class Recorder:
    """A display that records what it is told."""

    def __init__(self, calls: list[Any], *operation: Any) -> None:
        self._calls = calls
        calls.append(operation)

    def advance(self, count: int, note: str) -> None:
        self._calls.append((count, note))

    def close(self) -> None:
        self._calls.append("closed")


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    recorded: list[Any] = []
    show_with(lambda *operation: Recorder(recorded, *operation))
    yield recorded
    show_with(None)


def test_a_display_is_told_everything_and_closed_after_an_error(calls: list[Any]) -> None:
    def interrupted() -> None:
        with Progress("merging", 3) as progress:
            progress.advance()
            progress.advance(2, "a note")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert calls == [("merging", 3, "pieces", False), (1, ""), (2, "a note"), "closed"]


def test_without_a_display_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("merging", 3) as progress:
        progress.advance(3)
    assert capfd.readouterr() == ("", "")


def test_bars_are_drawn_on_a_terminal_alone() -> None:
    command = [sys.executable, "-c", BARS]
    shown = shown_on_terminal(command, ("stderr",), 80)
    assert "writing" in shown
    assert "10/10 bytes" in shown
    done = subprocess.run(command, check=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_long_operation_prints_a_line_now_and_then_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = ProgressLines("screening", 40, clock=lambda: now)
    for second in range(4, 44, 4):
        now = float(second)
        lines.advance(4, "")
    lines.close()
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "screening: 12 of 40, about 28 s left",
        "screening: 24 of 40, about 16 s left",
        "screening: 36 of 40, about 4 s left",
    ]


def test_only_long_operations_are_shown_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_with(progress_display)
    try:
        assert isinstance(progress_display("screening", 40, "pieces", True), ProgressLines)
        assert progress_display("writing", 40, "bytes", False) is None
        with Progress("screening", 3, long=True) as progress:
            progress.advance()
    finally:
        show_with(None)
    assert capsys.readouterr() == ("", "")
