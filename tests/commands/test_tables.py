"""Tables of the command line: aligned, and as wide as their content wherever they are shown."""

import sys

import pytest

from pos2d.commands.shared.tables import table


def test_numbers_are_aligned_right_and_other_cells_left() -> None:
    rows = [("one branch", "9", "3.2 ± 0.1", "2.13.0"), ("4 columns", "1024", "+0.01 ± 1e-05", "15.0.0")]
    assert table(("", "tokens", "change", "version"), rows).splitlines() == [
        "            tokens         change  version",
        "one branch       9      3.2 ± 0.1  2.13.0",
        "4 columns     1024  +0.01 ± 1e-05  15.0.0",
    ]


def test_a_table_may_have_no_head_and_empty_cells() -> None:
    assert table((), [("a", "1", "x"), ("bcd", "", "")]) == "a    1  x\nbcd"
    assert table(("a", "b"), []) == "a  b"


def test_nothing_is_cut_or_read_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "[bold]word[/bold] " * 200
    assert table((), [("日本", long), ("a", "b")]) == f"日本  {long.rstrip()}\na     b"


def test_cells_are_there_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert table(("a", "b"), [("1", "2")]) == "a  b\n1  2"
