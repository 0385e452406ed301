"""Every command of the README that takes an artifact, with a plain model directory in its place."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from transformers import LlamaConfig

from tests.bases import SHAPE, write_base, write_tokenizer
from tests.docs.pages import ROOT, blocks

ARTIFACT = re.compile(r"my/(?:merged|onnx|bnb)[\w-]*")


def commands() -> list[list[str]]:
    """The arguments of all commands that name an artifact, but for those that a plain model is not for.

    ``push`` is for artifacts alone, a GGUF file needs a tokenizer that llama.cpp knows, and ``serve``, which
    tests/commands/test_serve.py starts, does not end by itself.
    """
    lines = [
        line.rpartition(" | ")[2] for line in blocks("bash")[1].splitlines() if "pos2d " in line and line[0] != "#"
    ]
    split = [arguments for line in lines if (arguments := shlex.split(line)[1:])[0] not in ("push", "serve")]
    split = [arguments for arguments in split if "gguf" not in arguments]
    return [arguments for arguments in split if ARTIFACT.fullmatch(arguments[1] if len(arguments) > 1 else "")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks bytes, with a chat template."""
    directory = tmp_path_factory.mktemp("plain")
    base = write_base(directory / "model", LlamaConfig(**SHAPE | {"max_position_embeddings": 4096}))
    write_tokenizer(base, chat=True)
    return base


def test_the_readme_has_such_commands() -> None:
    verbs = {arguments[0] for arguments in commands()}
    assert verbs == {"export", "run", "batch", "show-layout", "bench", "eval", "verify"}


def test_every_command_takes_a_plain_model(plain: Path, tmp_path: Path, call: Callable[..., Result]) -> None:
    graph = tmp_path / "graph"
    assert call("export", plain, "--no-verify", "-o", graph).exit_code == 0
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n{"prompts": ["b", "c"]}\n', encoding="utf-8")
    for number, (verb, _, *flags) in enumerate(commands()):
        made = [str(plain) if ARTIFACT.fullmatch(flag) else flag for flag in flags]
        paths = {"my/questions.jsonl": tmp_path / "questions.jsonl", "examples": ROOT / "examples"}
        for named, path in paths.items():
            made = [str(path) + flag.removeprefix(named) if flag.startswith(named) else flag for flag in made]
        for output in ("-o", "--output"):
            if output in made:
                made[made.index(output) + 1] = str(tmp_path / f"out-{number}")
        # A plain model has no hashes, and nothing says what it should compute: it is what others are compared with.
        first = graph if verb == "verify" else plain
        against = ["--against", str(plain)] if verb == "verify" and "--against" not in made else []
        prompt = ["--prompt", "x"] if verb == "run" and not {"--prompt", "--mode"} & set(made) else []
        result = call(verb, first, *made, *against, *prompt)
        assert result.exit_code == 0, (verb, made, result.output)
