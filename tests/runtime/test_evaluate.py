"""``eval``: its figures against the trainer's logits and against itself, what it reads, and what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy

from pos2d import exporter, runtime
from pos2d.errors import InputError, UsageError
from pos2d.manifest import read_manifest
from pos2d.runtime.evaluation.sequences import SAMPLE_TOKENS, TEXT_TOKENS, read_sequences
from pos2d.runtime.text.tokenization import load_tokenizer
from tests.bases import write_tokenizer
from tests.bounds import LOGITS
from tests.conftest import Golden, read_golden

START = 1
# A mean of log probabilities, which are off by twice what logits are at most; both are up to 6.
NLL = 2 * LOGITS


def write_numbers(directory: Path, size: int = 256, opens: bool = False) -> None:
    """A tokenizer of ids written as numbers, so that any ids can be a text; with ``opens``, one starts every text."""
    names = [str(number) if number != START else "<s>" for number in range(size)]
    tokenizer = Tokenizer(models.WordLevel(vocab={name: number for number, name in enumerate(names)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if opens:
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")


def write_text(path: Path, samples: Sequence[Sequence[int]]) -> Path:
    path.write_text("\n\n".join(" ".join(map(str, ids)) for ids in samples), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class Case:
    """A golden case merged with its tokenizer, and its branches as a text."""

    golden: Golden
    merged: Path
    text: Path


def made(golden: Golden, place: Path, **tokenizer: Any) -> Case:
    base = shutil.copytree(golden.path / "base", place / "base")
    write_numbers(base, **tokenizer)
    exporter.merge(output=place / "merged", **{**golden.flags, "base_model": base})
    draw = np.random.default_rng(0)
    branches = golden.facts.get("branch_inputs") or [draw.integers(2, 256, n).tolist() for n in (5, 9, 3)]
    return Case(golden, place / "merged", write_text(place / "text", branches))


@pytest.fixture(scope="module")
def columnar(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(read_golden("qwen2_r050_left"), tmp_path_factory.mktemp("columnar"))


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "opened"])
def isolated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(read_golden("qwen2_no_rope2d"), tmp_path_factory.mktemp("isolated"), opens=request.param)


def test_an_artifact_is_at_no_distance_from_itself(columnar: Case) -> None:
    report = runtime.evaluate(columnar.merged, columnar.text, against=columnar.merged, branches=3)
    assert [case.name for case in report.cases] == ["one branch", "3 columns"]
    for case in report.cases:
        assert (case.mean_kl, case.nll_change, case.top1_agreement) == (0.0, 0.0, 1.0)
        assert case.perplexity == case.reference_perplexity == pytest.approx(np.exp(case.nll))


def test_one_branch_is_the_cross_entropy_of_the_trainers_logits(columnar: Case, tmp_path: Path) -> None:
    ids = columnar.golden.tensors["single.input_ids"][0]
    (case,) = runtime.evaluate(columnar.merged, write_text(tmp_path / "text", [ids]), branches=1).cases
    logits = torch.from_numpy(columnar.golden.tensors["single.logits"][0, :-1])
    assert case.nll == pytest.approx(float(cross_entropy(logits, torch.from_numpy(ids[1:]))), rel=NLL)
    assert (case.tokens, case.tokens_read, case.nll_error) == (len(ids) - 1, len(ids), None)


def test_columns_are_the_cross_entropy_of_the_trainers_logits(columnar: Case) -> None:
    tensors = columnar.golden.tensors
    case = runtime.evaluate(columnar.merged, columnar.text, branches=3).cases[1]
    ids, logits, owners = (torch.from_numpy(tensors[f"multi.{name}"][0]) for name in ("input_ids", "logits", "pos2d"))
    slots = [torch.nonzero(owners[:, 0] == value)[:, 0] for value in sorted(set(owners[:, 0].tolist()))]
    rows, targets = (torch.cat(parts) for parts in ([own[:-1] for own in slots], [ids[own[1:]] for own in slots]))
    assert len(slots) == 3
    assert case.nll == pytest.approx(float(cross_entropy(logits[rows], targets)), rel=NLL)
    assert (case.sequences, case.samples, case.tokens) == (1, 3, len(rows))


def test_isolated_columns_read_every_sample_as_alone(isolated: Case) -> None:
    alone, together = runtime.evaluate(isolated.merged, isolated.text, branches=3).cases
    assert together.tokens == alone.tokens == 4 + 8 + 2
    assert together.tokens_read == alone.tokens_read
    assert together.nll == pytest.approx(alone.nll, rel=NLL)


def test_the_error_is_that_of_a_mean_of_samples(columnar: Case, tmp_path: Path) -> None:
    samples = np.random.default_rng(1).integers(2, 256, (5, 12)).tolist()
    whole = runtime.evaluate(columnar.merged, write_text(tmp_path / "all", samples), branches=1).cases[0]
    each = [
        runtime.evaluate(columnar.merged, write_text(tmp_path / "one", [ids]), branches=1).cases[0].nll
        for ids in samples
    ]
    assert whole.nll == pytest.approx(np.mean(each))
    assert whole.nll_error == pytest.approx(np.std(each, ddof=1) / 5**0.5)
    assert whole.perplexity_error == pytest.approx(whole.perplexity * (whole.nll_error or 0))


def test_chunks_give_what_one_pass_gives(columnar: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = {"against": columnar.merged, "branches": 3}
    whole = runtime.evaluate(columnar.merged, columnar.text, **flags).cases
    monkeypatch.setattr(sys.modules["pos2d.runtime.evaluate"], "MAX_LOGITS", 4 * 256)
    for found, expected in zip(runtime.evaluate(columnar.merged, columnar.text, **flags).cases, whole, strict=True):
        assert found.nll == pytest.approx(expected.nll, rel=NLL)
        assert (found.tokens, found.mean_kl, found.top1_agreement) == (expected.tokens, 0.0, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_int8_is_near_and_onnx_is_nearer(columnar: Case, dtype: str, tmp_path: Path) -> None:
    exporter.export(columnar.merged, tmp_path / "int8", format="bnb", quant="8bit")
    exporter.export(columnar.merged, tmp_path / "onnx", no_verify=True)
    text = write_text(tmp_path / "text", np.random.default_rng(2).integers(2, 256, (8, 40)).tolist())
    int8 = runtime.evaluate(tmp_path / "int8", text, against=columnar.merged, dtype=dtype).cases
    onnx = runtime.evaluate(tmp_path / "onnx", text, against=columnar.merged).cases
    for near, nearer in zip(int8, onnx, strict=True):
        assert near.mean_kl is not None
        assert nearer.mean_kl is not None
        # At most half the square of what logits are off (Hoeffding): float32 is a thousandth of this.
        assert abs(nearer.mean_kl) < 1e-9 < near.mean_kl < 1e-2
        perplexity = pytest.approx(nearer.perplexity, rel=NLL * nearer.nll)
        assert nearer.reference_perplexity == near.reference_perplexity == perplexity


def test_a_conversation_predicts_its_last_turn_and_branches_stand_after_their_context(
    columnar: Case, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, chat=True)
    manifest, tokenizer = read_manifest(columnar.merged), load_tokenizer(tmp_path)
    rows = [{"q": "hi", "a": "yes"}, {"branches": ["one", "two"], "main": "all"}, {"text": "abc"}]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    alone, pairs = read_sequences(path, tokenizer, manifest, 2)
    assert [tokenizer.decode(sequence.targets) for sequence in alone] == ["yes", "ne", "wo", "bc"]
    assert [tokenizer.decode(sequence.layout.ids) for sequence in alone] == [
        "<user>hi\n<assistant>yes",
        "allone",
        "alltwo",
        "abc",
    ]
    (pair,) = pairs
    assert tokenizer.decode(pair.layout.ids) == "allotnweo"
    assert tokenizer.decode(pair.targets) == "nweo"


def test_an_opening_token_is_read_and_not_predicted(isolated: Case) -> None:
    opens = load_tokenizer(isolated.merged)("7").input_ids == [START, 7]
    alone, _ = read_sequences(isolated.text, load_tokenizer(isolated.merged), read_manifest(isolated.merged), 1)
    assert [len(sequence.layout) - len(sequence.targets) for sequence in alone] == [1 + opens] * 3
    assert [sequence.layout.ids[0] == START for sequence in alone] == [opens] * 3


def test_long_texts_are_cut(columnar: Case, tmp_path: Path) -> None:
    tokenizer, manifest = load_tokenizer(columnar.merged), read_manifest(columnar.merged)
    path = write_text(tmp_path / "text", [[7] * (SAMPLE_TOKENS + 1)] * 30)
    alone, four = read_sequences(path, tokenizer, manifest, 4)
    assert {len(sequence.layout) for sequence in alone} == {SAMPLE_TOKENS}
    assert len(alone) == -(-TEXT_TOKENS // SAMPLE_TOKENS)
    assert len(four) == len(alone) // 4
    _, many = read_sequences(path, tokenizer, manifest, 16)
    assert len(many[0].layout) <= manifest.context_length
    for branches in (0, -1, manifest.context_length):
        with pytest.raises(UsageError, match=f"`branches` {branches} must be"):
            read_sequences(path, tokenizer, manifest, branches)


def test_the_command_prints_a_table_or_json(call: Callable[..., Result], columnar: Case) -> None:
    ask = ["eval", columnar.merged, "--text", columnar.text]
    plain = call(*ask)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.splitlines()[-1].endswith("fewer than 4 neighbouring samples with the same context")
    assert "KL" not in plain.stdout
    compared = call(*ask, "--against", columnar.merged, "--branches", 3).stdout.splitlines()
    assert len({len(line) for line in compared[1:]}) == 1
    assert compared[-1].split()[:2] == ["3", "columns"]
    report = json.loads(call(*ask, "--against", columnar.merged, "--json").stdout)
    assert report["cases"][0]["mean_kl"] == 0.0
    assert report["visibility"] == "columnar"
    assert "fewer" in report["columns_skipped"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no text of two tokens"),
        ("7\n\n8", "no text of two tokens"),
        ('{"text": "7 8"}\n{', "line 2 is not JSON"),
        ("7 8 299", "token 299 of it, beyond the vocabulary of 256"),
        (None, "cannot be read: No such file"),
    ],
)
def test_texts_that_cannot_be_read(columnar: Case, text: str | None, message: str, tmp_path: Path) -> None:
    artifact = shutil.copytree(columnar.merged, tmp_path / "artifact")
    write_numbers(artifact, size=300)
    listed = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    listed["files"] = {name: {"bytes": (artifact / name).stat().st_size} for name in listed["files"]}
    (artifact / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    if text is not None:
        (tmp_path / "text").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        runtime.evaluate(artifact, tmp_path / "text")


def test_other_models_and_broken_ones_are_refused(columnar: Case, isolated: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the same model: rope_2d"):
        runtime.evaluate(columnar.merged, columnar.text, against=isolated.merged)
    broken = shutil.copytree(columnar.merged, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="logits that are not finite"):
        runtime.evaluate(broken, columnar.text)


def test_an_artifact_without_a_tokenizer_is_refused_before_its_weights_are_read(columnar: Case, tmp_path: Path) -> None:
    """Loading takes minutes, so what can be refused is refused first."""
    bare = shutil.copytree(columnar.merged, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    listed = json.loads((bare / "manifest.json").read_text(encoding="utf-8"))
    del listed["files"]["tokenizer.json"]
    (bare / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    (bare / "model.safetensors").write_bytes(b"\0" * (bare / "model.safetensors").stat().st_size)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        runtime.evaluate(bare, columnar.text)
