"""``run --mode chat`` from a pipe and at a terminal, and the other ways into ``run``."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from click.testing import Result

from pos2d import exporter, runtime
from pos2d.commands.main import command_of
from pos2d.runtime.engine.sampling import PRESETS
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, str(ROOT / "cli.py")]


def piped(artifact: Path, *lines: str, flags: tuple[str, ...] = ("-n", "6")) -> "subprocess.CompletedProcess[str]":
    command = [*CLI, "run", str(artifact), "--mode", "chat", *flags]
    return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)


def _heed_ctrl_c() -> None:
    # A shell starts its background jobs with Ctrl-C ignored, and whatever they start inherits that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def terminal(talking: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a chat at a terminal of its own."""
    started = []

    def start(*flags: str, kind: str = "onnx", columns: int = 100, **environment: str) -> Any:
        given = {
            "PATH": "/usr/bin:/bin",
            "TERM": "xterm",
            "XDG_STATE_HOME": str(tmp_path),
            "LANG": "C.UTF-8",
            **environment,
        }
        command = ["run", str(talking / kind), "--mode", "chat", *flags]
        child = pexpect.spawn(
            sys.executable,
            [CLI[1], *command],
            env=given,
            encoding="utf-8",
            timeout=60,
            dimensions=(30, columns),
            codec_errors="replace",
            preexec_fn=_heed_ctrl_c,
        )
        started.append(child)
        child.expect("/help shows the commands")
        child.expect("User: ")
        return child

    yield start
    for child in started:
        child.close(force=True)


def test_lines_from_a_pipe_are_turns(talking: Path) -> None:
    done = piped(talking / "onnx", "one", "", "and two", "quit", "never read")
    assert done.returncode == 0
    model = runtime.load(talking / "onnx")
    conversation = model.conversation(max_new_tokens=6)
    expected = ["".join(event.text for event in conversation.ask(question)) for question in ("one", "and two")]
    assert done.stdout == "".join(f"{text}\n" for text in expected)
    assert done.stderr == ""


def test_a_message_of_several_lines(talking: Path, tmp_path: Path) -> None:
    piped(talking / "onnx", "one \\", "and more", f"/save {tmp_path / 'talk.json'}")
    turns = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert turns[0]["content"] == "one \nand more"


def test_what_no_line_may_do(talking: Path, tmp_path: Path) -> None:
    """Bytes that are no text, names that are no files, a file that is another's: said, and the chat goes on."""
    kept = tmp_path / "kept.txt"
    kept.write_text("mine", encoding="utf-8")
    lines = [
        b"a \xff",
        b"/save ~nobody-here/x",
        b"/save a\0b",
        f"/save {kept}".encode(),
        f"/load {kept}".encode(),
        b"one",
    ]
    command = [*CLI, "run", str(talking / "onnx"), "--mode", "chat", "-n", "6"]
    done = subprocess.run(command, input=b"\n".join(lines), capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert kept.read_text(encoding="utf-8") == "mine"
    said = done.stderr.decode().splitlines()
    for line, words in zip(
        said,
        (
            "not text in UTF-8",
            "is not a file name",
            "is not a file name",
            "exists and is not a conversation",
            "is not a conversation",
        ),
        strict=True,
    ):
        assert words in line


def test_standard_input_may_be_closed(talking: Path) -> None:
    for flags, code in ((("-p", "-"), 3), (("--mode", "chat"), 0)):
        words = [*CLI, "run", str(talking / "onnx"), *flags]
        done = subprocess.run(["bash", "-c", '"$@" <&-', "bash", *words], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "defect" not in done.stderr


def test_output_that_nobody_reads(talking: Path) -> None:
    words = [*CLI, "run", str(talking / "onnx"), "-p", "one", "-n", "300", "--jsonl"]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 1; exit "${PIPESTATUS[0]}"', "bash", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_the_end_of_a_pipe_is_the_end(talking: Path) -> None:
    assert piped(talking / "merged", "one").returncode == 0
    assert piped(talking / "merged").stdout == ""


def test_commands(talking: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    done = piped(
        talking / "onnx",
        "one",
        f"/save {saved}",
        "/branches a | b |",
        "/reset",
        "one",
        f"/load {saved}",
        "and two",
        f"/save {saved}.2",
        "/help",
        "EXIT",
    )
    assert done.returncode == 0, done.stderr
    turns = json.loads(Path(f"{saved}.2").read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"] == turns[:2]
    assert "[1] a\n" in done.stdout
    assert "[2] b\n" in done.stdout
    assert "/branches QUESTION" in done.stdout
    assert "2 messages are in" in done.stderr
    assert "the conversation starts again" in done.stderr


def test_the_system_turn_stays_after_a_reset(talking: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.txt"
    rules.write_text("be brief\n", encoding="utf-8")
    flags = ("-n", "6", "--system-prompt", f"@{rules}")
    done = piped(talking / "onnx", "one", "/reset", "one", f"/save {tmp_path / 'talk.json'}", flags=flags)
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:]
    turns = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert turns[0] == {"role": "system", "content": "be brief"}
    assert len(turns) == 3


def test_faults_are_said_and_do_not_end_it(talking: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"messages": [{"role": 3}]}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    done = piped(
        talking / "onnx",
        "/nothing",
        "/branches",
        "/save",
        f"/save {tmp_path}",
        f"/load {tmp_path / 'none'}",
        f"/load {tmp_path / 'broken.json'}",
        f"/load {tmp_path / 'list.json'}",
        "x" * 600,
        "one",
    )
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if line]
    for line, words in zip(
        said,
        (
            "there is no command /nothing",
            "needs questions",
            "name of a file",
            "is a directory",
            "cannot be read",
            "is not a turn",
            "is not a conversation",
            "the model has 512",
        ),
        strict=True,
    ):
        assert line.startswith("error: ")
        assert words in line
    assert done.stdout.strip()


def test_at_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(terminal: Any) -> None:
    child = terminal("-n", "400", kind="merged")  # on torch, whose steps take their time
    child.delaybeforesend = None
    child.sendline("one")
    child.expect("Assistant: .")
    child.sendintr()
    child.expect(" …\r\n")
    child.expect("User: ")
    child.sendintr()
    child.expect("quit, exit or Ctrl-D leave")
    child.expect("User: ")
    child.sendline("exit")
    child.expect("Bye.")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_at_a_terminal_lines_are_edited_and_remembered(terminal: Any, tmp_path: Path) -> None:
    child = terminal("-n", "3")
    child.sendline("/hepl\x1b[D\x1b[D\x1b[C\x7f\x7f\x04lp")  # moved about, deleted, typed again
    child.expect("User: ")
    child.sendeof()
    child.expect("Bye.")
    child.expect(pexpect.EOF)
    history = tmp_path / "pos2d" / "chat_history"
    assert history.read_text(encoding="utf-8").strip()
    assert history.stat().st_mode & 0o077 == 0
    again = terminal("-n", "3")
    again.send("\x1b[A\x01\x0b/help\r")  # the line before, away with it
    again.expect("/branches QUESTION")
    again.expect("User: ")


@pytest.mark.parametrize("columns", [100, 34])
def test_at_a_terminal_branches_are_panels(terminal: Any, columns: int) -> None:
    child = terminal("-n", "4", columns=columns, NO_COLOR="1")
    child.sendline("/branches what is a? | and b?")
    child.expect("User: ")
    lines = child.before.split("\x1b[2K")[-1].splitlines()
    titles = [line for line in lines if "╭" in line]
    assert all(any(f" {title} " in line for line in titles) for title in ("what is a?", "and b?"))
    assert len(titles) == (1 if columns == 100 else 2)
    assert "\x1b[3" not in child.before  # no colour


def test_chat_needs_a_template(call: Call, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    write_tokenizer(base)
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(base, lora, tmp_path / "merged")
    result = call("run", tmp_path / "merged", "--mode", "chat")
    assert result.exit_code == 3
    assert "has no chat template" in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--mode", "chat", "-p", "x"), "do not apply to --mode chat"),
        (("--mode", "chat", "--json"), "do not apply to --mode chat"),
        (("--mode", "chat", "--ignore-chat-template"), "do not apply to --mode chat"),
        (("-p", "x", "--json", "--jsonl"), "give one of them"),
        (("-p", "x", "--logprobs"), "with --json and --jsonl"),
        (("-p", "x", "--top-logprobs", "2"), "--top-logprobs are printed with --json"),
        (("-p", "x", "--logit-bias", '{"300": 1}'), "--logit-bias has token 300, which is outside the vocabulary"),
        (("-p", "-", "-p", "-"), "give it once"),
        (("-p", "x", "--max-branches", "0"), "--max-branches 0"),
        (("-p", "x", "--top-p", "0.5"), "does not use --top-p"),
    ],
)
def test_flags_that_do_not_go_together(call: Call, talking: Path, flags: tuple[str, ...], words: str) -> None:
    result = call("run", talking / "onnx", *flags)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


def test_presets_are_listed_and_heeded(call: Call, talking: Path) -> None:
    (choice,) = [option.type for option in command_of("run").params if option.name == "preset"]
    assert list(choice.choices) == list(PRESETS)  # type: ignore[attr-defined]
    listed = call("run", "--list-presets").stdout
    for preset, values in PRESETS.items():
        (line,) = [line for line in listed.splitlines() if line.startswith(preset)]
        assert line.split()[1:] == [str(value) for value in values.values()]
    asked = call("run", talking / "onnx", "-p", "one", "--preset", "code", "--top-k", "7", "--json")
    sampling = json.loads(asked.stdout)["sampling"]
    assert {name: sampling[name] for name in PRESETS["code"]} == {**PRESETS["code"], "top_k": 7}


def test_standard_input_files_and_lines_of_json(talking: Path, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("said before. \n", encoding="utf-8")
    flags = ["-p", "-", "-p", "b", "--context", f"@{tmp_path / 'context.txt'}", "-n", "5", "--jsonl", "--logprobs"]
    done = subprocess.run(
        [*CLI, "run", str(talking / "onnx"), *flags], input="a\n", capture_output=True, text=True, check=True
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    answers = runtime.load(talking / "onnx").generate(["a", "b"], "said before. ", max_new_tokens=5)
    for branch, answer in enumerate(answers):
        own = [event for event in events if event["branch"] == branch]
        assert tuple(event["token"] for event in own) == answer.token_ids
        assert "".join(event["text"] for event in own) == answer.text
        assert own[-1]["finish_reason"] == answer.finish_reason
        assert all(event["logprob"] < 0 for event in own)
