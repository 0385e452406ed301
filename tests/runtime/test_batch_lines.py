"""Lines of a batch: the user's own keys, the context of the whole file, standard input, and what fails."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from pos2d import runtime
from pos2d.errors import InputError
from pos2d.runtime.batching.lines import KNOWN_KEYS
from pos2d.runtime.batching.own_keys import own_keys

Call = Callable[..., Result]
OPTIONS: Any = {"max_new_tokens": 4}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def texts(record: dict[str, Any]) -> list[str]:
    return [completion["text"] for completion in record["completions"]]


def test_own_keys_are_carried_through_in_their_order(talking: Path, tmp_path: Path) -> None:
    own = {"answer": "4", "id": 7, "meta": None, "tags": ["a", {"b": 1.5}], "category": "é", "prompt_id": 1, "": 0}
    output = tmp_path / "out.jsonl"
    runtime.batch(talking / "onnx", write(tmp_path / "in.jsonl", own | {"prompt": "2 + 2"}, own), output, **OPTIONS)
    answered, wrong = records(output)
    assert list(answered.items())[:-1] == [("line", 1), *own.items()]
    assert list(wrong) == ["line", *own, "error"]


def test_a_number_is_a_prompt_where_lines_are_texts(talking: Path, tmp_path: Path) -> None:
    numbers = "1984\ntrue\nNaN\n"
    for name in ("in.txt", "in.jsonl"):
        (tmp_path / name).write_text(f"{numbers}1 || 2\n", encoding="utf-8")
        runtime.batch(talking / "onnx", tmp_path / name, tmp_path / f"{name}.out", **OPTIONS)
    assert [len(texts(record)) for record in records(tmp_path / "in.txt.out")] == [1, 1, 1, 2]
    assert ["error" in record for record in records(tmp_path / "in.jsonl.out")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("temprature", "did you mean 'temperature'"),
        ("Top_P", "did you mean 'top_p'"),
        ("top-k", "did you mean 'top_k'"),
        ("max_tokens", "did you mean 'max_new_tokens'"),
        ("promt", "did you mean 'prompt'"),
        ("message", "did you mean 'messages'"),
        ("stop_strings", "did you mean 'stop'"),
        ("temp", "did you mean 'temperature'"),
        ("tools", "did you mean 'chat_template_kwargs'"),
        ("frequency-penalty", "did you mean 'frequency_penalty'"),
        ("best_of", "a setting of another program"),
        ("no_repeat_ngram_size", "a setting of another program"),
        ("completions", "the record of its answer has one"),
        ("line", "the record of its answer has one"),
    ],
)
def test_a_key_that_looks_like_an_option_is_none_of_the_users(key: str, words: str) -> None:
    with pytest.raises(InputError, match=f"a line takes no {key!r}.*{words}"):
        own_keys({"prompt": "a", key: 1}, KNOWN_KEYS)


def test_the_context_of_the_file_is_that_of_lines_without_one(talker: runtime.Model, tmp_path: Path) -> None:
    """Lines that share it share sequences, and are answered as each is alone."""
    user = {"role": "user", "content": "and you?"}
    source = write(
        tmp_path / "in.jsonl",
        {"prompt": "first"},
        {"prompt": "own", "context": "said before"},
        {"messages": [user]},
        {"messages": [{"role": "system", "content": "mine"}, user]},
        {"prompts": ["a", "bc"]},
        {"prompt": "none", "context": ""},
        {"prompt": "the second that is longer", "branch_stride": 7},
        {"prompt": "and a third"},
    )
    output = tmp_path / "out.jsonl"
    runtime.batch(talker.path, source, output, context="be brief", **OPTIONS)

    def ask(prompts: Any, context: str = "be brief", **options: Any) -> list[str]:
        return [answer.text for answer in talker.generate(prompts, context, **OPTIONS, **options)]

    system = {"role": "system", "content": "be brief"}
    assert [texts(record) for record in records(output)] == [
        ask("first"),
        ask("own", "said before"),
        [talker.chat([system, user], **OPTIONS).text],
        [talker.chat([{"role": "system", "content": "mine"}, user], **OPTIONS).text],
        ask(["a", "bc"]),
        ask("none", ""),
        ask("the second that is longer", branch_stride=7),
        ask("and a third"),
    ]


def test_a_context_is_prefilled_once(talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.load(talking / "onnx")
    fed: list[int] = []
    forward = type(model.backend).forward

    def counting(self: Any, ids: Any, *rest: Any) -> Any:
        fed.append(ids.size)
        return forward(self, ids, *rest)

    monkeypatch.setattr(type(model.backend), "forward", counting)
    source = write(tmp_path / "in.jsonl", *({"prompt": f"p{number}"} for number in range(9)))
    runtime.batch(talking / "onnx", source, tmp_path / "out", context="word " * 40, max_branches=3, max_new_tokens=1)
    prompts = sum(len(f"<user>p{number}\n<assistant>") for number in range(9))
    assert sum(fed) == len("<system>\n") + 5 * 40 + prompts


def test_the_context_belongs_to_the_recipe(call: Call, talking: Path, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", {"prompt": "a"}), tmp_path / "out.jsonl"
    (tmp_path / "context").write_text("be brief\n", encoding="utf-8")
    command = ("batch", talking / "onnx", "-i", source, "-o", output, "-n", 2)
    assert call(*command, "--context", f"@{tmp_path / 'context'}").exit_code == 0
    assert call(*command, "--context", "be brief").exit_code == 0
    other = call(*command)
    assert other.exit_code == 6
    assert "with another context" in other.stderr


def test_standard_input_is_an_input(talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines are prompts; the same input again is the same batch."""
    output = tmp_path / "out.jsonl"

    def piped(data: bytes) -> runtime.BatchReport:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return runtime.batch(talking / "onnx", "-", output, **OPTIONS)

    lines = b'\xef\xbb\xbfWhat is it?\n{"prompt": "b", "id": 3}\n'
    assert (piped(lines).lines, piped(lines).resumed) == (2, 2)
    assert records(output)[1]["id"] == 3
    for data, words in ((b"", "standard input is empty"), ("a\n".encode("utf-16"), "standard input is text in UTF-16")):
        with pytest.raises(InputError, match=words):
            piped(data)


def test_a_batch_without_an_answer_has_failed(call: Call, talking: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": ""}, {"prompt": "a", "top_k": "x"}, {"prompt": " "})
    for _ in range(2):  # also where it was finished before
        result = call("batch", talking / "onnx", "-i", source, "-o", tmp_path / "out.jsonl", "--json")
        assert result.exit_code == 3
        reason = "2 of them: line 1: prompt 1 is empty; give it some text"
        assert result.stderr.splitlines() == [
            f"warning: 3 of 3 lines have an error in place of an answer; {reason}",
            "error: no line has an answer",
        ]
        assert json.loads(result.stdout)["common_error_count"] == 2
    assert [record["line"] for record in records(tmp_path / "out.jsonl")] == [1, 2, 3]


def test_settings_that_leave_no_room_are_an_error_of_their_line(talking: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", {"prompt": "x" * 60}, {"prompt": "a"}, {"prompt": "x" * 60, "max_new_tokens": 2}
    )
    artifact = shutil.copytree(talking / "onnx", tmp_path / "onnx")
    (artifact / "generation_config.json").write_text('{"max_length": 40}', encoding="utf-8")
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["generation_config.json"]["bytes"] = 18
    (artifact / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    report = runtime.batch(artifact, source, tmp_path / "out.jsonl")
    assert report.errors == 1
    assert "max_length" in records(tmp_path / "out.jsonl")[0]["error"]


def test_values_that_are_off_narrow_nothing(talking: Path, tmp_path: Path) -> None:
    off: list[dict[str, Any]] = [{"top_p": 1}, {"top_p": 1.0, "top_k": 0, "min_p": 0}, {"top_k": 1}]
    source = write(tmp_path / "in.jsonl", *({"prompt": "a", "temperature": 0} | values for values in off))
    assert runtime.batch(talking / "onnx", source, tmp_path / "out.jsonl", **OPTIONS).errors == 0
