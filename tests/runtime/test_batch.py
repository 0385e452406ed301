"""Batches: every form of a line, the answers that it would have alone, and runs that are cut off anywhere."""

import contextlib
import importlib
import json
import os
import random
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
from pos2d.errors import InputError, OutputError, UsageError
from tests.batch_files import FORMS, write_lines

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
batch_module: Any = importlib.import_module("pos2d.runtime.batch")
members: Any = importlib.import_module("pos2d.runtime.scheduling.members")
OPTIONS: Any = {"max_new_tokens": 8}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]  # whatever ends a line


def texts(record: dict[str, Any]) -> list[str]:
    return [completion["text"] for completion in record["completions"]]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_line_is_answered_as_it_would_be_alone(talker: runtime.Model, tmp_path: Path) -> None:
    """All forms, in one file and each through the Python interface."""
    source, output = write_lines(tmp_path / "in.jsonl", len(FORMS)), tmp_path / "out.jsonl"
    report = runtime.batch(talker.path, source, output, **OPTIONS)
    found = records(output)
    assert [record["line"] for record in found] == list(range(1, len(FORMS) + 1))
    assert (report.lines, report.errors, report.resumed) == (len(FORMS), 1, 0)

    def ask(prompts: Any, context: str | None = None, **options: Any) -> list[str]:
        return [answer.text for answer in talker.generate(prompts, context, **{**OPTIONS, **options})]

    assert found[0]["id"] == "first"
    assert found[6]["meta"] == {"any": [1]}
    assert texts(found[0]) == ask("one 0")
    assert texts(found[1]) == [talker.chat(FORMS[1]["messages"], **OPTIONS).text]
    assert texts(found[2]) == ask(["a", "bc", "def"], "said before. ")
    assert texts(found[3]) == ask(["x y", "what?", "said"], "over all")
    assert texts(found[4]) == ask(["left", "right"])
    assert texts(found[5]) == ask("drawn 5", temperature=1.1, top_k=20, seed=3, max_new_tokens=5)
    assert texts(found[6]) == ask("stopped 6", stop=("e", "a"))
    assert texts(found[7]) == ask(["p", "q"], visibility="isolated", preset="code")
    assert found[8]["error"].startswith("a line takes no 'temprature'; did you mean 'temperature'?")
    (long,) = talker.generate(json.loads(source.read_text().splitlines()[9])["prompt"], logprobs=True, **OPTIONS)
    (completion,) = found[9]["completions"]
    assert completion["finish_reason"] == long.finish_reason
    assert completion["new_tokens"] == len(long.token_ids)
    assert completion["logprobs"] == pytest.approx(long.logprobs, abs=1e-4)  # ten times what float32 gives


def test_lines_win_over_flags(talker: runtime.Model, tmp_path: Path) -> None:
    drawn: Any = {"temperature": 2.0, "top_k": 40, "seed": 4}
    source = write(tmp_path / "in.jsonl", {"prompt": "one", **drawn}, {"prompt": "one", "temperature": 0})
    output = tmp_path / "out.jsonl"
    runtime.batch(talker.path, source, output, temperature=0.5, top_p=0.5, **OPTIONS)
    first, second = records(output)
    assert texts(first) == [talker.generate("one", top_p=0.5, **drawn, **OPTIONS)[0].text]
    assert texts(second) == [talker.generate("one", **OPTIONS)[0].text]


def test_lines_share_passes_and_never_a_sequence(
    talker: runtime.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single prompts, and lines with several branches; ``max_branches`` limits both together."""
    shapes: list[tuple[int, int]] = []
    forward_spans = members.forward_spans

    def counting(backend: Any, layouts: Any, *rest: Any) -> Any:
        shapes.append((len(layouts), max(len(layout.last) for layout in layouts)))
        return forward_spans(backend, layouts, *rest)

    monkeypatch.setattr(members, "forward_spans", counting)
    asked: list[dict[str, Any]] = [{"prompt": f"question {k}"} for k in range(7)]
    asked += [{"prompts": [f"one {k}", f"two {k}"]} for k in range(4)]
    source = write(tmp_path / "in.jsonl", *asked)
    runtime.batch(talker.path, source, tmp_path / "out.jsonl", max_branches=4, **OPTIONS)
    assert {(4, 1), (2, 2)} <= set(shapes)
    assert max(sequences * branches for sequences, branches in shapes) == 4
    for line, record in zip(asked, records(tmp_path / "out.jsonl"), strict=True):
        prompts = line.get("prompts") or [line["prompt"]]
        assert texts(record) == [answer.text for answer in talker.generate(prompts, **OPTIONS)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "the line is empty"),
        (b"{", "neither a JSON object"),
        (b"[1]", "neither a JSON object"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"{}", "a line must have one of prompt"),
        (b'{"prompt": "a", "prompts": ["b"]}', "a line must have one of prompt"),
        (b'{"prompt": 3}', "prompt has 3, which is not a text"),
        (b'{"prompt": "  "}', "prompt 1 is empty"),
        (b'{"prompts": []}', "prompts must be a list"),
        (b'{"branches": [{"answer": "a"}]}', "is not a text"),
        (b'{"messages": []}', "messages must be a list of turns"),
        (b'{"messages": [{"role": "user"}]}', "messages must be a list of turns"),
        (b'{"messages": [{"role": "user", "content": "a"}], "context": "b"}', "its own system turn"),
        (b'{"prompt": "a", "context": 3}', "the context must be one text"),
        (b'{"prompt": "a", "temperature": "hot"}', "`temperature` 'hot' must be a number"),
        (b'{"prompt": "a", "top_p": 0.5}', "greedy decoding (temperature 0) does not use `top_p`"),
        (b'{"prompt": "a", "preset": "poetry"}', "`preset` 'poetry'"),
        (b'{"prompt": "a", "visibility": "blind"}', "`visibility` 'blind'"),
        (b'{"prompt": "a", "branch_stride": "b"}', "`branch_stride` 'b' must be a whole number"),
        (b'{"prompt": "a", "stop": 3}', "`stop` 3 must be a text or several"),
        (b'{"prompt": "a", "end_token": "<nowhere>"}', "`end_token` '<nowhere>'"),
        (b'{"prompt": "a", "end_token": "\\ud800"}', "`end_token` '\\ud800'"),
        (b'{"prompt": "' + b"x" * 600 + b'"}', "the model has 512"),
        (b"a||", "prompt 2 is empty"),
        (b'{"prompt": "a \\ud800"}', "is not text in UTF-8"),
        (b'{"prompt": "a", "id": "\\ud800"}', "id cannot be written again"),
        (b'{"prompt": "a", "meta": NaN}', "meta cannot be written again"),
        (b'{"prompt": "a", "meta": ' + b"[" * 200_000, "the JSON is nested too deeply"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "0.001 to 100"),
        (b'{"prompt": "a", "branch_stride": 1' + b"0" * 23 + b"}", "must be 1 to 16777216"),
        (b'{"prompt": "a", "visibility": "isolated", "align_to": "right"}', "`align_to` has no effect"),
        (b'{"prompt": "a", "visibility": ""}', "`visibility` ''"),
        (b'{"prompt": "a", "logprobs": "false"}', "must be true or false"),
    ],
)
def test_what_cannot_be_answered_is_a_record(talking: Path, tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    report = runtime.batch(talking / "onnx", tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=2)
    first, second, third = records(tmp_path / "out.jsonl")
    assert words in second["error"]
    assert "error" not in first | third
    assert report.errors == 1


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bytes(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after any number of bytes of a record, thirty times in one file."""
    source = write_lines(tmp_path / "in.jsonl", 150)
    runtime.batch(talking / "onnx", source, tmp_path / "whole.jsonl", **OPTIONS)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    draw = random.Random(7)
    write = batch_module.write_records
    output = tmp_path / "out.jsonl"
    cuts = 0
    for _ in range(30):
        left = draw.randrange(1, 4)

        def cut(file: Any, records: Any) -> None:
            nonlocal left, cuts
            left -= 1
            if left:
                write(file, records)
                return
            file.write(records[: draw.randrange(len(records))])
            file.flush()
            cuts += 1
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(batch_module, "write_records", cut)
            with contextlib.suppress(KeyboardInterrupt):
                runtime.batch(talking / "onnx", source, output, **OPTIONS)
                break
        assert not output.exists()
    assert cuts > 5
    runtime.batch(talking / "onnx", source, output, **OPTIONS)
    assert output.read_bytes() == whole
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_killed_at_random_and_started_again(talking: Path, tmp_path: Path) -> None:
    """A thousand mixed lines, SIGKILL as soon as some more of them are there."""
    source = write_lines(tmp_path / "in.jsonl", 1000)
    command = [sys.executable, str(ROOT / "cli.py"), "batch", str(talking / "onnx"), "-i", str(source), "-n", "4"]
    runtime.batch(talking / "onnx", source, tmp_path / "whole.jsonl", max_new_tokens=4)
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    draw = random.Random(1)
    kills = 0
    for _ in range(20):
        before = partial.stat().st_size if partial.exists() else 0
        wanted = before + draw.randrange(8_000)
        with subprocess.Popen([*command, "-o", str(output)], stderr=subprocess.PIPE) as process:
            while process.poll() is None and (partial.stat().st_size if partial.exists() else 0) < wanted:
                time.sleep(0.001)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert kills >= 15
    done = subprocess.run([*command, "-o", str(output), "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["resumed"] > 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [record["line"] for record in records(output)] == list(range(1, 1001))


def test_what_is_finished_is_left_and_what_is_anothers_is_kept(talking: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "one"})
    output = tmp_path / "out.jsonl"

    def ask(**options: Any) -> runtime.BatchReport:
        return runtime.batch(talking / "onnx", source, output, **{**OPTIONS, **options})

    ask()
    made = output.stat().st_mtime_ns
    assert ask().resumed == 1
    assert output.stat().st_mtime_ns == made
    with pytest.raises(OutputError, match="with another max_new_tokens; `force=True` replaces it"):
        ask(max_new_tokens=3)
    ask(max_new_tokens=3, force=True)
    assert records(output)[0]["completions"][0]["new_tokens"] == 3
    output.rename(tmp_path / "out.jsonl.partial")
    os.rename(tmp_path / "out.jsonl.run.json", tmp_path / "out.jsonl.partial.json")
    with pytest.raises(OutputError, match="the beginning of another run, with another max_new_tokens; finish"):
        ask()
    ask(force=True)
    assert records(output)[0]["completions"][0]["new_tokens"] == 8


def test_two_processes_do_not_write_one_file(talking: Path, tmp_path: Path) -> None:
    import fcntl

    source = write(tmp_path / "in.jsonl", {"prompt": "one"})
    output = tmp_path / "out.jsonl"
    with (tmp_path / "out.jsonl.partial").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            runtime.batch(talking / "onnx", source, output, force=True, **OPTIONS)


def test_what_another_process_finished_meanwhile_is_kept(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ends while this one loads its model."""
    source, output = write(tmp_path / "in.jsonl", {"prompt": "one"}), tmp_path / "out.jsonl"
    load = batch_module.load_opened

    def late(*given: Any, **flags: Any) -> Any:
        with monkeypatch.context() as other:
            other.setattr(batch_module, "load_opened", load)
            runtime.batch(talking / "onnx", source, output, max_new_tokens=3)
        return load(*given, **flags)

    with monkeypatch.context() as patched:
        patched.setattr(batch_module, "load_opened", late)
        with pytest.raises(OutputError, match="written by another process meanwhile"):
            runtime.batch(talking / "onnx", source, output, **OPTIONS)
    assert records(output)[0]["completions"][0]["new_tokens"] == 3
    assert runtime.batch(talking / "onnx", source, output, max_new_tokens=3).resumed == 1


def test_a_forced_run_that_was_given_up_does_not_vouch_for_the_old_output(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", {"prompt": "one"}), tmp_path / "out.jsonl"
    runtime.batch(talking / "onnx", source, output, max_new_tokens=3)

    def cut(file: Any, records: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(batch_module, "write_records", cut)
        with pytest.raises(KeyboardInterrupt):
            runtime.batch(talking / "onnx", source, output, force=True, **OPTIONS)
    (tmp_path / "out.jsonl.partial").unlink()
    with pytest.raises(OutputError, match="`force=True` replaces it"):
        runtime.batch(talking / "onnx", source, output, **OPTIONS)
    assert runtime.batch(talking / "onnx", source, output, max_new_tokens=3).resumed == 1


def test_a_run_that_ended_at_either_edge_goes_on(talking: Path, tmp_path: Path) -> None:
    """Before it wrote anything, and when only the last name was missing."""
    source, output = write(tmp_path / "in.jsonl", {"prompt": "one"}), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").touch()
    runtime.batch(talking / "onnx", source, output, **OPTIONS)
    whole = output.read_bytes()
    block = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    (tmp_path / "out.jsonl.partial.json").write_text(json.dumps({"recipe": block["recipe"]}))
    output.rename(tmp_path / "out.jsonl.partial")
    assert runtime.batch(talking / "onnx", source, output, **OPTIONS).resumed == 1
    assert output.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]


def test_inputs_that_would_be_lost(talking: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "one"})
    before = source.read_bytes()
    with pytest.raises(UsageError, match="would be written over"):
        runtime.batch(talking / "onnx", source, source, force=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file, and it must be read twice"):
        runtime.batch(talking / "onnx", tmp_path / "pipe", tmp_path / "out.jsonl")
    for directory in (tmp_path, "."):
        with pytest.raises(OutputError, match="is a directory"):
            runtime.batch(talking / "onnx", source, directory, force=True)
    assert source.read_bytes() == before


def test_what_a_batch_refuses(call: Call, talking: Path, tmp_path: Path) -> None:
    source, empty = write(tmp_path / "in.jsonl", {"prompt": "one"}), tmp_path / "empty.jsonl"
    empty.touch()
    for flags, code, words in (
        (("-i", tmp_path / "none.jsonl", "-o", tmp_path / "o"), 3, "cannot be read"),
        (("-i", empty, "-o", tmp_path / "o"), 3, "is empty"),
        (("-i", source, "-o", tmp_path / "none" / "o"), 5, "is not a directory"),
        (("-i", source, "-o", tmp_path / "o", "--temperature", "-1"), 2, "temperature -1"),
        (("-i", source, "-o", tmp_path / "o", "--max-branches", "0"), 2, "--max-branches 0"),
    ):
        result = call("batch", talking / "onnx", *flags)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
        assert not (tmp_path / "o").exists()
    assert call("batch", tmp_path, "-i", source, "-o", tmp_path / "o").exit_code == 3


def test_a_file_of_another_editor(talking: Path, tmp_path: Path) -> None:
    """A byte order mark, lines that end as on Windows, and line separators within a text."""
    source = tmp_path / "in.jsonl"
    source.write_bytes('\ufeff{"prompt": "is a || b true?", "id": "x\u2028y\x85z"}\r\n{"prompt": "b"}\r\n'.encode())
    runtime.batch(talking / "onnx", source, tmp_path / "out.jsonl", max_new_tokens=3)
    first, second = records(tmp_path / "out.jsonl")
    assert first["id"] == "x\u2028y\x85z"
    assert len(first["completions"]) == len(second["completions"]) == 1


def test_a_file_of_plain_questions(talking: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text('What is it?\n{"prompt": "b"}\na||b\n{broken\n', encoding="utf-8")
    runtime.batch(talking / "onnx", tmp_path / "in.txt", tmp_path / "out.jsonl", max_new_tokens=3)
    found = records(tmp_path / "out.jsonl")
    assert [len(record.get("completions", ())) for record in found] == [1, 1, 2, 0]
    assert texts(found[0]) == [runtime.load(talking / "onnx").generate("What is it?", max_new_tokens=3)[0].text]


def test_turns_need_the_template(talking: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a"})
    runtime.batch(talking / "onnx", source, tmp_path / "out.jsonl", ignore_chat_template=True, max_new_tokens=2)
    first, second = records(tmp_path / "out.jsonl")
    assert "leave `ignore_chat_template` out" in first["error"]
    assert "completions" in second


def test_command_line_says_what_it_did(call: Call, talking: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "one"}, {"prompt": ""})
    result = call("batch", talking / "onnx", "-i", source, "-o", tmp_path / "out.jsonl", "-n", 4)
    assert result.exit_code == 0
    assert "2 lines; 4 tokens in" in result.stdout
    reason = "line 2: prompt 1 is empty; give it some text"
    assert result.stderr == f"warning: 1 of 2 lines have an error in place of an answer; {reason}\n"


def test_errors_of_the_library(talking: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="temperature"):
        runtime.batch(talking / "onnx", tmp_path / "in", tmp_path / "out", temperature=-1.0)
    with pytest.raises(InputError, match="cannot be read"):
        runtime.batch(talking / "onnx", tmp_path / "in", tmp_path / "out")


def test_empty_answers_are_counted_and_explained(talker: runtime.Model, tmp_path: Path) -> None:
    first = talker.generate("one", max_new_tokens=1)[0].text
    source = write(tmp_path / "in.jsonl", {"prompt": "one", "stop": [first]}, {"prompt": "one"}, {"prompt": " "})
    report = runtime.batch(talker.path, source, tmp_path / "out.jsonl", max_new_tokens=1)
    assert [texts(record) for record in records(tmp_path / "out.jsonl")[:2]] == [[""], [first]]
    assert (report.empty, report.errors) == (1, 1)
    assert report.warnings[0].startswith("1 of 3 lines have empty answers")
