"""``show-layout``: the drawing agrees with the layout, and prompts may have any characters."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from rich.cells import cell_len

from pos2d import exporter, runtime
from pos2d.errors import InputError, OutputError, UsageError
from pos2d.layout import Layout, build_layout
from pos2d.runtime.layout_view.picture import bands, printable
from pos2d.runtime.layout_view.svg import draw_svg
from pos2d.runtime.layout_view.text import draw_text
from pos2d.spec import Rope2DSpec
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer
from tests.terminal import shown_on_terminal

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["one two three four", "five six", "seven eight nine"]
AWKWARD = [
    "<&>\"'",
    "日本語",
    "👩‍👩‍👧",
    "a\u202eb",
    "\x1b[31m",
    "\udcff",
    "\ufffe",
    "line\u2028end",
    "ünïcödé" * 9,
    "]]>",
]
NUMBERS = {"position": "positions", "branch": "branches", "time": "times", "owner": "owners"}
CASES: dict[str, dict[str, Any]] = {
    "columnar": {},
    "isolated": {"visibility": "isolated"},
    "with a context": {"context": "said before"},
    "isolated, with a context": {"visibility": "isolated", "context": "said before"},
    "aligned right": {"align_to": "right"},
    "aligned right, with a context": {"align_to": "right", "context": "said before", "branch_stride": 7},
}


def groups(svg: str) -> list[ElementTree.Element]:
    """The tokens of a drawing, in the order of their slots."""
    found = [e for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g") if "data-slot" in e.attrib]
    return sorted(found, key=lambda group: int(group.attrib["data-slot"]))


def laid_out(flags: dict[str, Any]) -> Layout:
    """The layout that ``flags`` describe, with numbers in place of words."""
    settings = {name: value for name, value in flags.items() if name != "context"}
    context = flags.get("context", "").split()
    return build_layout(
        [list(range(len(prompt.split()))) for prompt in PROMPTS],
        Rope2DSpec(2, (1, 2), **settings),
        list(range(len(context))),
    )


@pytest.mark.parametrize("case", CASES)
def test_the_drawing_says_what_the_layout_says(case: str) -> None:
    layout = laid_out(CASES[case])
    for slot in range(len(layout)):
        report = runtime.show_layout(prompt=PROMPTS, token=slot, **CASES[case])
        drawn = groups(draw_svg(report))
        assert [g.attrib["class"] != "token unseen" for g in drawn] == layout.mask()[slot].tolist()
        assert [int(g.attrib["data-slot"]) for g in drawn if g.attrib["class"] == "token chosen"] == [slot]
        for name, plural in NUMBERS.items():
            assert [int(group.attrib[f"data-{name}"]) for group in drawn] == getattr(layout, plural).tolist()
        said = draw_text(report, 200).plain
        assert said.splitlines()[-4].endswith(f"attends to {int(layout.mask()[slot].sum())} of {len(layout)} tokens")


@pytest.mark.parametrize("case", CASES)
def test_rows_are_branches_and_columns_are_times(case: str) -> None:
    drawn = groups(draw_svg(runtime.show_layout(prompt=PROMPTS, **CASES[case])))
    boxes = [next(g.iter("{http://www.w3.org/2000/svg}rect")).attrib for g in drawn]
    places: dict[str, dict[int, set[int]]] = {"x": {}, "y": {}}
    for group, box in zip(drawn, boxes, strict=True):
        places["x"].setdefault(int(group.attrib["data-time"]), set()).add(int(box["x"]))
        places["y"].setdefault(int(group.attrib["data-owner"]), set()).add(int(box["y"]))
    for found in places.values():
        assert all(len(values) == 1 for values in found.values())
        inked = [min(found[key]) for key in sorted(found)]
        assert inked == sorted(set(inked))


def test_wide_pictures_continue_below() -> None:
    words = [f"word{number}" for number in range(100)]
    report = runtime.show_layout(prompt=[" ".join(words), "short"])
    svg = draw_svg(report)
    assert int(ElementTree.fromstring(svg).attrib["width"]) <= 1200
    assert len(groups(svg)) == 101
    assert bands([3, 3, 9, 1, 1], 6) == [range(2), range(2, 3), range(3, 5)]
    assert bands([], 6) == [range(0)]


def test_awkward_text_is_well_formed(tmp_path: Path) -> None:
    report = runtime.show_layout(prompt=[" ".join(AWKWARD), "a"], output=tmp_path / "a.svg", context="<b>&amp;")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    titles = [group[0].text for group in groups(svg)]
    for token, title in zip(report.tokens, titles, strict=True):
        place = f"position {token.position}, branch {token.branch}, time {token.time}"
        assert title == f"{printable(token.text)}: {place}"
    assert ElementTree.fromstring(svg).attrib["viewBox"].startswith("0 0 ")
    assert not re.search(r"<script|href|url\(|@import", svg)
    assert draw_text(report, 80).plain.encode()
    assert "\x1b" not in draw_text(report, 80).plain
    assert printable("a b\n\t\r\x00\x7f\u200b") == "a␣b⏎⇥␍␀\ufffd\ufffd"


@pytest.mark.parametrize("width", [40, 120])
@pytest.mark.parametrize("case", CASES)
def test_text_fits_its_width(case: str, width: int) -> None:
    report = runtime.show_layout(prompt=[*PROMPTS, "日本語 " + "long" * 30], **CASES[case])
    text = draw_text(report, width).plain
    assert max(map(cell_len, text.splitlines())) <= width
    marks = re.findall(
        r"[●○\[] ?[^\s]+", "\n".join(line for line in text.splitlines() if line[:6] in ("prompt", "contex"))
    )
    assert len(marks) == len(report.tokens)
    assert sum(mark[0] != "○" for mark in marks) == sum(token.visible for token in report.tokens)
    assert sum(mark[0] == "[" for mark in marks) == 1


def test_text_in_a_pipe_and_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "show-layout", "-p", "one two", "-p", "three [b]"]
    piped = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    assert "\x1b" not in piped
    assert "● three  [[b]]" in piped
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in shown_on_terminal(command, ["stdout"], 80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*[34]\d", shown_on_terminal(command, ["stdout"], 80))


def test_a_token_is_named_by_slot_or_text() -> None:
    def chosen(token: str | int | None) -> int:
        return runtime.show_layout(prompt=["a b c", "d b 7"], token=token).chosen

    assert [chosen(None), chosen(0), chosen("3"), chosen("b"), chosen("d")] == [5, 0, 3, 2, 1]
    for unknown in ("x", "6", 7, "-1", ""):
        with pytest.raises(UsageError, match=r"give a slot from 0 to 5 or a text, such as 0 \(a\), 1 \(d\)"):
            chosen(unknown)


def test_refusals(tmp_path: Path, call: Call) -> None:
    there = tmp_path / "there.svg"
    there.write_text("mine")
    for flags, error, words in (
        ({"output": there}, OutputError, "exists already.*`force=True`"),
        ({"output": tmp_path / "a.png"}, OutputError, "does not end in .svg"),
        ({"output": tmp_path / "a.svg", "token": "zz"}, UsageError, "there is no token zz"),
        ({"force": True}, UsageError, "`force`"),
        ({"ignore_chat_template": True}, UsageError, "`ignore_chat_template`"),
        ({"align_to": "right", "visibility": "isolated"}, UsageError, "`align_to`"),
        ({"branch_stride": 0}, UsageError, "must be 1 to 16777216"),
        ({"prompt": ["a", " "]}, InputError, "prompt 2 is empty"),
        ({"prompt": []}, InputError, "no prompt"),
        ({"model": tmp_path}, InputError, "config.json does not exist"),
    ):
        given: dict[str, Any] = {"prompt": ["a"], **flags}
        with pytest.raises(error, match=words):
            runtime.show_layout(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["there.svg"]
    assert there.read_text() == "mine"
    assert call("show-layout", "-p", "a", "-o", there).exit_code == 6
    assert call("show-layout", "-p", "a", "-o", there, "--force").exit_code == 0
    assert len(groups(there.read_text(encoding="utf-8"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.svg"]


@pytest.mark.parametrize("chat", [False, True])
def test_an_artifact_gives_tokens_and_positions(chat: bool, tmp_path: Path, call: Call) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    write_tokenizer(base, chat=chat)
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(base, lora, tmp_path / "merged", branch_stride=16, align_to="right")
    report = runtime.show_layout(tmp_path / "merged", prompt=["ab", "c\nde"])
    asked = ["<user>ab\n<assistant>", "<user>c\nde\n<assistant>"] if chat else ["ab", "c\nde"]
    rows = ["".join(token.text for token in report.tokens if token.owner == owner) for owner in (0, 1)]
    assert rows == asked
    assert {token.branch for token in report.tokens} == {0, 16}
    assert report.align_to == "right"
    assert not report.words
    plain = runtime.show_layout(
        tmp_path / "merged", prompt=["ab"], branch_stride=5, context="x", ignore_chat_template=True
    )
    assert [(token.text, token.branch) for token in plain.tokens] == [("x", 0), ("a", 5), ("b", 5)]
    assert "⏎" in call("show-layout", tmp_path / "merged", "-p", "a", "-p", "b\nc", "--token", "\n").stdout

    exporter.merge(base, lora, tmp_path / "flat", no_patch_rope=True)
    flat = runtime.show_layout(tmp_path / "flat", prompt=["ab", "c"])
    assert (flat.branch_stride, flat.visibility) == (None, "isolated")
    assert {token.branch for token in flat.tokens} == {0}
    with pytest.raises(UsageError, match="`branch_stride` has no effect"):
        runtime.show_layout(tmp_path / "flat", prompt=["ab"], branch_stride=2)
    (tmp_path / "merged" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json"):
        runtime.show_layout(tmp_path / "merged", prompt=["ab"])


def test_json_is_the_report(tmp_path: Path, call: Call) -> None:
    done = call("show-layout", "-p", "a b", "-p", "c", "--json", "-o", tmp_path / "a.svg")
    report = runtime.show_layout(prompt=["a b", "c"])
    assert json.loads(done.stdout) == json.loads(json.dumps(asdict(report))) | {"output": str(tmp_path / "a.svg")}
    assert json.loads(done.stdout)["tokens"][2] == {
        "text": "b",
        "slot": 2,
        "position": 2,
        "branch": 0,
        "time": 1,
        "owner": 0,
        "visible": False,
    }


def test_the_pictures_in_the_docs_are_what_their_commands_draw(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "positions.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("pos2d show-layout -")]
    shell = "\n".join(command.replace("pos2d", f'"{sys.executable}" "{ROOT}/cli.py"', 1) for command in commands)
    subprocess.run(["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "my").iterdir()}
    others = {"architecture.svg", "page.png"}
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.name not in others]
    assert made == {path.name: path.read_bytes() for path in pictures}
    assert len(made) == 3
