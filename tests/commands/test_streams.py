"""Standard streams that are closed, full or in another encoding, and texts from any editor: nothing is lost."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from pos2d import runtime
from pos2d.commands.shared.streams import print_json, read_input
from pos2d.commands.terminal.transcript import load_messages
from pos2d.errors import InputError
from pos2d.sources.files.json_object import read_json_object
from pos2d.text_files import open_text, read_text

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
CLI = (sys.executable, str(ROOT / "cli.py"))
MARK = b"\xef\xbb\xbf"
TEXT = "Zwölf Boxkämpfer 🥊 — ж"
ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8", "utf-16")


def stream(encoding: str, errors: str = "backslashreplace") -> tuple[io.BytesIO, io.TextIOWrapper]:
    data = io.BytesIO()
    return data, io.TextIOWrapper(data, encoding=encoding, errors=errors)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    value = {"text": TEXT, "lone": "a\udc80"}
    data, out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    print_json(value)
    out.flush()
    assert json.loads(data.getvalue().decode(encoding)) == value
    assert encoding == "utf-8" or data.getvalue().decode(encoding).isascii()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_an_ended_run_leaves_no_temporary_files(talking: Path, tmp_path: Path, number: str) -> None:
    """Here the lines that a batch reads from a pipe, while it waits for more."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [*CLI, "batch", str(talking / "onnx"), "-i", "-", "-o", str(tmp_path / "out.jsonl")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob("pos2d-*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(getattr(signal, number))
        assert process.wait() == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii"])
def test_an_answer_is_printed_with_escapes(talking: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*CLI, "run", str(talking / "onnx"), "-p", TEXT, "-p", "b", "-n", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"[1] " + TEXT.encode(encoding, "backslashreplace"))


def shell(script: str, *arguments: object, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run ``script`` with the command line as its first arguments; ``$@`` is the rest."""
    command = ["sh", "-c", script, *CLI, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_closed_or_full_output_ends_as_documented(talking: Path) -> None:
    ask: tuple[object, ...] = ("run", talking / "onnx", "-p", "a", "-n", 2)
    for arguments in (ask, ("--help",)):
        closed = shell('"$0" "$@" >&-', *arguments)
        assert (closed.returncode, "error" in closed.stderr) == (141, False), arguments
    for flags in (("--help",), ("run", "--list-presets", "--json")):
        full = shell('"$0" "$@" >/dev/full', *flags)
        assert (full.returncode, full.stderr) == (5, "error: standard output: No space left on device\n")
    mute = shell('"$0" "$@" 2>&-', *ask)
    assert (mute.returncode, len(mute.stdout) > 0) == (0, True)


def test_the_summary_has_its_own_line_where_both_streams_are_one_file(talking: Path) -> None:
    both = shell('"$0" "$@" 2>&1', "run", talking / "onnx", "-p", "a", "-n", 3)
    assert both.stdout.splitlines()[-1].startswith("3 tokens, "), both.stdout


def test_a_question_may_come_from_a_pipe(call: Call, talking: Path) -> None:
    from click.testing import CliRunner

    from pos2d.commands.main import cli

    expected = call("run", talking / "onnx", "-p", "what?", "-n", 4).stdout
    for text in (b"what?\n", MARK + b"what?\r\n"):
        asked = CliRunner().invoke(cli, ["run", str(talking / "onnx"), "-n", "4"], input=text)
        assert asked.stdout == expected
    assert CliRunner().invoke(cli, ["run", str(talking / "onnx")], input=b" \n").exit_code == 2


def test_standard_input_is_read_as_utf_8_before_the_terminals_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for data, encoding in (
        (TEXT.encode(), "ascii"),
        (MARK + TEXT.encode(), "cp1252"),
        ("né".encode("latin-1"), "latin-1"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))
        assert read_input() == ("né" if encoding == "latin-1" else TEXT)
    for data in ("né".encode("latin-1"), TEXT.encode("utf-16"), "ab".encode("utf-16-le")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        with pytest.raises(InputError, match="standard input "):
            read_input()


def test_a_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(MARK + b'{"messages": [{"role": "user",\r\n "content": "a"}]}')
    assert read_text(path).startswith('{"messages"')
    assert "\r" not in read_text(path)
    with open_text(path) as file:
        assert file.readline() == '{"messages": [{"role": "user",\n'
    assert load_messages(str(path)) == read_json_object(path, "")["messages"]
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        path.write_text('{"a": 1}', encoding=encoding)
        for read in (read_text, open_text, lambda path: read_json_object(path, "save it again")):
            with pytest.raises(InputError, match=f"{path} .*UTF-(16|32).*; save it as UTF-8"):
                read(path)


def test_a_context_of_a_file_with_a_mark(call: Call, talking: Path, tmp_path: Path) -> None:
    shown = []
    for name, mark in (("with", MARK), ("without", b"")):
        (tmp_path / name).write_bytes(mark + b"be brief\r\n")
        result = call("run", talking / "onnx", "--context", f"@{tmp_path / name}", "-p", "a", "-n", 1, "--json")
        shown.append(json.loads(result.stdout)["prompt_tokens"])
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\\n", "a\tb\\n"),
        (r"\u00e9\ud83e\udd4a", "é🥊"),
        (r"\d \u12 \q", r"\d \u12 \q"),
        ("\n", "\n"),
    ],
)
def test_escapes_of_a_stop_text_are_read_on_the_command_line_alone(
    call: Call, talking: Path, typed: str, meant: str
) -> None:
    result = call("run", talking / "onnx", "-p", "a", "-n", 1, "--stop", typed, "--json")
    assert json.loads(result.stdout)["sampling"]["stop"] == [meant]
    report = runtime.run(talking / "onnx", "a", max_new_tokens=1, stop=typed)
    assert report.sampling["stop"] == (typed,)


def test_presets_are_printed_as_json(call: Call) -> None:
    from pos2d.runtime.engine.sampling import PRESETS

    for command in ("run", "batch"):
        for flags in (("--list-presets", "--json"), ("--json", "--list-presets")):
            assert json.loads(call(command, *flags).stdout) == PRESETS
        assert "creative" in call(command, "--list-presets").stdout
