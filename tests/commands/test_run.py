"""From text to text: templates, contexts, streaming, JSON, and what ``run`` refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from pos2d import exporter, runtime
from pos2d.runtime.text.detokenizer import StreamDetokenizer
from pos2d.runtime.text.tokenization import encode_prompts, load_tokenizer
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer
from tests.terminal import shown_on_terminal

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def artifacts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``merged``, ``onnx`` and ``flat`` (without 2D RoPE), with and without a chat template."""
    root = tmp_path_factory.mktemp("run")
    base = write_base(root / "base", CONFIGS["llama"])
    write_tokenizer(base, chat=request.param)
    lora = write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(base, lora, root / "merged")
    exporter.merge(base, lora, root / "flat", no_patch_rope=True)
    exporter.export(root / "merged", root / "onnx", no_verify=True)
    return root


def test_the_tokenizer_travels_to_every_artifact(artifacts: Path) -> None:
    of_base = json.loads((artifacts / "base" / "tokenizer_config.json").read_text(encoding="utf-8"))
    for kind in ("merged", "flat", "onnx"):
        vocabulary = artifacts / kind / "tokenizer.json"
        assert vocabulary.read_bytes() == (artifacts / "base" / "tokenizer.json").read_bytes()
        settings = json.loads(vocabulary.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
        assert settings.items() >= of_base.items()


def test_both_backends_write_the_same_text(artifacts: Path) -> None:
    ask: dict[str, Any] = {"prompt": ["one", "and two"], "context": "said before. ", "max_new_tokens": 12}
    texts = [[c.text for c in runtime.run(artifacts / kind, **ask).completions] for kind in ("merged", "onnx")]
    assert texts[0] == texts[1]


def test_run_is_generate_ids_between_two_tokenizer_calls(artifacts: Path) -> None:
    model, tokenizer = runtime.load(artifacts / "onnx"), load_tokenizer(artifacts / "onnx")
    report = runtime.run(artifacts / "onnx", ["one", "and two"], max_new_tokens=9, ignore_chat_template=True)
    ids = model.generate_ids([tokenizer("one").input_ids, tokenizer("and two").input_ids], max_new_tokens=9)
    assert [list(c.token_ids) for c in report.completions] == ids
    assert [c.text for c in report.completions] == [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    assert report.prompt_tokens == 10
    assert report.new_tokens == sum(map(len, ids))


def test_streamed_text_is_the_final_text(artifacts: Path) -> None:
    heard = ["", ""]

    def listen(event: runtime.Event) -> None:
        heard[event.branch] += event.text

    report = runtime.run(artifacts / "onnx", ["one", "and two"], max_new_tokens=20, on_event=listen)
    assert heard == [completion.text for completion in report.completions]


def test_visibility_is_the_artifacts_unless_asked(artifacts: Path) -> None:
    ask: dict[str, Any] = {"prompt": ["one", "and two"], "max_new_tokens": 2}
    assert runtime.run(artifacts / "merged", **ask).visibility == "columnar"
    assert runtime.run(artifacts / "flat", **ask).visibility == "isolated"
    assert runtime.run(artifacts / "merged", visibility="isolated", **ask).visibility == "isolated"


def test_isolated_prompts_are_answered_as_alone(artifacts: Path) -> None:
    for kind in ("flat", "onnx"):
        ask: dict[str, Any] = {"context": "said before. ", "max_new_tokens": 12, "visibility": "isolated"}
        together = runtime.run(artifacts / kind, ["one", "and two"], **ask).completions
        assert together == tuple(runtime.run(artifacts / kind, [p], **ask).completions[0] for p in ("one", "and two"))


def test_chat_template_and_context(artifacts: Path) -> None:
    tokenizer = load_tokenizer(artifacts / "merged")
    chat = bool(tokenizer.chat_template)
    plain = encode_prompts(tokenizer, ["a", "b"], "rules", chat=chat, add_special_tokens=False)
    assert tokenizer.decode(plain.context) == ("<system>rules\n" if chat else "rules")
    assert tokenizer.decode(plain.branches[1]) == ("<user>b\n<assistant>" if chat else "b")
    alone = encode_prompts(tokenizer, ["a"], None, chat=chat, add_special_tokens=True)
    assert tokenizer.decode(alone.branches[0]) == ("<user>a\n<assistant>" if chat else "a")
    assert alone.context is None


def test_incomplete_characters_wait_for_their_last_byte(artifacts: Path) -> None:
    tokenizer = load_tokenizer(artifacts / "merged")
    text = StreamDetokenizer(tokenizer)
    pieces = [text.append(token) for token in tokenizer("né€").input_ids]
    assert pieces == ["n", "", "é", "", "", "€"]
    assert text.append(tokenizer("é").input_ids[0]) == ""
    assert text.close() == "\ufffd"


def test_command_line_prints_answers_to_stdout_and_figures_to_stderr(call: Call, artifacts: Path) -> None:
    one = call("run", artifacts / "onnx", "--prompt", "one", "--max-new-tokens", 8)
    assert one.exit_code == 0
    assert one.stdout == runtime.run(artifacts / "onnx", ["one"], max_new_tokens=8).completions[0].text + "\n"
    assert "tokens/s" in one.stderr
    two = call("run", artifacts / "onnx", "-p", "one", "-p", "and two", "-n", 8)
    assert two.stdout.startswith("[1] one\n")
    assert "[2] and two\n" in two.stdout


@pytest.mark.parametrize(("columns", "side_by_side"), [(100, True), (40, False)])
def test_on_a_terminal_answers_stand_side_by_side(artifacts: Path, columns: int, side_by_side: bool) -> None:
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "run",
        str(artifacts / "onnx"),
        "-p",
        "one",
        "-p",
        "two",
        "-n",
        "4",
    ]
    shown = shown_on_terminal(command, ("stdin", "stdout"), columns)
    last = shown.split("\x1b[2K")[-1].splitlines()
    titles = [line for line in last if " one " in line or " two " in line]
    assert len(titles) == (1 if side_by_side else 2)


def test_command_line_json(call: Call, artifacts: Path) -> None:
    result = call("run", artifacts / "onnx", "--prompt", "one", "--prompt", "two", "--max_new_tokens", 5, "--json")
    report = json.loads(result.stdout)
    assert [completion["prompt"] for completion in report["completions"]] == ["one", "two"]
    assert report["completions"][0]["finish_reason"] in ("stop", "length")
    assert report["tokens_per_second"] > 0
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--prompt", ""), 3, "prompt 1 is empty"),
        (("--prompt", "a", "--prompt", "  "), 3, "prompt 2 is empty"),
        (("--prompt", "x" * 600), 3, "the model has 512; shorten"),
        (("--prompt", "a", "--context", "x" * 600), 3, "the model has 512; shorten"),
        (("--prompt", "a", "--temperature", "-1"), 2, "temperature -1"),
        (("--prompt", "a", "--seed", "-1"), 2, "seed -1"),
        (("--prompt", "a", "--max-new-tokens", "0"), 2, "--max-new-tokens 0"),
        (("--prompt", "a", "--device", "toaster"), 2, "device 'toaster'"),
        (("--prompt", "a", "--dtype", "int8"), 2, "int8"),
        ((), 2, "--prompt"),
    ],
)
def test_what_run_refuses(call: Call, artifacts: Path, flags: tuple[str, ...], code: int, words: str) -> None:
    for kind in ("merged", "onnx"):
        result = call("run", artifacts / kind, *flags)
        assert result.exit_code == code
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_an_artifact_without_a_tokenizer(call: Call, artifacts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifacts / "onnx", tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["tokenizer.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (copy / "tokenizer.json").unlink()
    result = call("run", copy, "--prompt", "a")
    assert result.exit_code == 3
    assert "no tokenizer.json" in result.stderr


def test_library_faces_refuse_bad_arrays(artifacts: Path) -> None:
    from pos2d.errors import InputError

    model = runtime.load(artifacts / "onnx")
    for arguments, words in (
        (([[1, 2, 300]],), "outside the vocabulary of 300"),
        (([[-1]],), "outside the vocabulary"),
        (([[]],), "no tokens"),
        (([[1, 2]], [[0, 1, 2]]), "`position_ids` has shape"),
        (([[1, 2]], None, [[0, 1]]), "`pos2d` has shape"),
        ((np.ones((1, 513), dtype=int),), "the model has 512"),
    ):
        with pytest.raises(InputError, match=words):
            model.logits(*arguments)
