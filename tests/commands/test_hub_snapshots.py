"""Every command on directories as the Hub's cache has them: each file is a link to a blob that is named by a hash."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer


def as_snapshot(directory: Path, place: Path) -> Path:
    """The files of ``directory`` as links in ``place/snapshots/COMMIT`` to ``place/blobs``."""
    snapshot = place / "snapshots" / ("5" * 40)
    blobs = place / "blobs"
    blobs.mkdir(parents=True)
    for file in (path for path in sorted(directory.rglob("*")) if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes() + file.name.encode()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * len(link.relative_to(place).parents[:-1])
        link.symlink_to(f"{up}blobs/{blob.name}")
        assert link.resolve() == blob.resolve()
    return snapshot


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    base = write_base(place / "plain base", CONFIGS["llama"])
    write_tokenizer(base, chat=True)
    write_adapter(place / "lora.pth", random_adapter(linear_modules(base)))
    (place / "prompts.txt").write_text("one question\n\nanother question\n", encoding="utf-8")
    return place


def test_every_command(place: Path, call: Callable[..., Result]) -> None:
    def right(*arguments: object) -> str:
        result = call(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
        return result.stdout

    base = as_snapshot(place / "plain base", place / "base")
    right("merge", "--base-model", base, "--lora", place / "lora.pth", "-o", place / "plain merged")
    merged = as_snapshot(place / "plain merged", place / "merged")
    right("export", merged, "--format", "onnx", "--no-verify", "-o", place / "plain onnx")
    right(
        "export",
        merged,
        "--format",
        "onnx",
        "--quant",
        "int8",
        "--no-calibration",
        "--no-verify",
        "-o",
        place / "plain int8",
    )
    right("export", merged, "--format", "bnb", "--quant", "8bit", "-o", place / "plain bnb")
    artifacts = {name: as_snapshot(place / f"plain {name}", place / name) for name in ("onnx", "int8", "bnb")}
    right("verify", artifacts["onnx"], "--against", merged)
    right("verify", artifacts["int8"])
    right("inspect", base)
    right("plan", base)
    for artifact in (merged, *artifacts.values()):
        plain = place / f"plain {artifact.parent.parent.name}"
        answers = [right("run", path, "-p", "a question", "--max-new-tokens", "4") for path in (plain, artifact)]
        assert answers[0] == answers[1]
        assert "llama" in right("inspect", artifact)
        right("plan", artifact)
    right(
        "batch", artifacts["int8"], "-i", place / "prompts.txt", "-o", place / "answers.jsonl", "--max-new-tokens", "2"
    )
    right("eval", artifacts["int8"], "--against", merged, "--text", place / "prompts.txt")
