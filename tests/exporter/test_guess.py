"""The guess of ratio and stride: a model's loss on its own text is lowest with the positions it was written with."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from transformers import PreTrainedTokenizerFast, Qwen3Config

from pos2d import exporter
from pos2d.errors import InputError, UsageError
from pos2d.exporter.inspection.guess import branch_losses, guess_positions, merged_model
from pos2d.exporter.inspection.position_grid import distinct_ratios
from pos2d.exporter.inspection.ranking import Guess, Score, choose, merge_flags, paired_difference
from pos2d.exporter.inspection.samples import BRANCH_TOKENS, Sample, read_samples
from pos2d.layout import build_layout
from pos2d.sources.adapters import read_adapters
from pos2d.sources.checkpoints.base import read_base
from pos2d.spec import Rope2DSpec, Visibility, pair_indices_for_ratio
from pos2d.text_samples import Branch
from tests.bases import CONFIGS, SHAPE, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer
from tests.bounds import LOGITS, logits_bound
from tests.exporter.test_families import stock_logits

Call = Callable[..., Result]
PROMPT, NEW = 3, 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with 12 frequencies that all rotate far within a short text, and a tokenizer of bytes."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    directory = write_base(tmp_path_factory.mktemp("base"), Qwen3Config(**SHAPE, head_dim=24, rope_parameters=rope))
    write_tokenizer(directory, chat=True)
    return directory


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    return write_adapter(base / "lora.pth", random_adapter(linear_modules(base)))


def spec_for(ratio: float | None, stride: int = 128, visibility: Visibility = "columnar") -> Rope2DSpec:
    return Rope2DSpec(12, () if ratio is None else pair_indices_for_ratio(12, ratio), stride, visibility=visibility)


def written(model: Any, spec: Rope2DSpec, seed: int, branches: int = 3) -> Sample:
    """Random prompts of one length, continued greedily in columns, without a cache: prompts of one length need none."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (branches, PROMPT)).tolist()
    model.model.rotary_emb.axes = spec.axes
    for _ in range(NEW):
        layout = build_layout(rows, spec)
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor(layout.ids)[None],
                position_ids=torch.tensor(layout.positions)[None],
                pos2d=torch.tensor(layout.pos2d)[None],
                attention_mask=torch.tensor(layout.mask())[None, None],
            ).logits[0]
        for row, slot in zip(rows, layout.last, strict=True):
            row.append(int(logits[slot, :256].argmax()))
    return Sample(tuple(Branch(tuple(row), PROMPT) for row in rows))


def guess_of_own_text(base: Path, lora: Path, spec: Rope2DSpec, samples: int = 8) -> Guess:
    checkpoint = read_base(str(base))
    adapters = read_adapters([lora], checkpoint)
    model = merged_model(checkpoint, adapters, spec)
    return guess_positions(checkpoint, adapters, [written(model, spec, seed) for seed in range(samples)])


@pytest.mark.parametrize(
    ("ratio", "stride"), [(1.0, 128), (0.5, 64), (0.25, 512), (0.75, 256), (0.5, 1), (None, 128), (0.125, 128)]
)
def test_own_text_names_the_positions_that_it_was_written_with(
    base: Path, lora: Path, ratio: float | None, stride: int
) -> None:
    guess = guess_of_own_text(base, lora, spec_for(ratio, stride))
    assert guess.scores[0] == guess.best
    assert (guess.best.ratio, guess.best.branch_stride) == (ratio, None if ratio is None else stride)
    assert guess.winner == ("columnar" if ratio is None else "2d rope")
    assert guess.winner_is_clear
    assert guess.ratio_is_clear
    assert guess.stride_is_clear
    assert not guess.cut


def test_text_that_was_written_alone_has_its_lowest_loss_alone(base: Path, lora: Path) -> None:
    checkpoint = read_base(str(base))
    adapters = read_adapters([lora], checkpoint)
    model = merged_model(checkpoint, adapters, spec_for(None))
    alone = [written(model, spec_for(None), seed, branches=1).branches[0] for seed in range(16)]
    samples = [Sample(tuple(alone[n : n + 4])) for n in range(0, 16, 4)]
    guess = guess_positions(checkpoint, adapters, samples)
    assert (guess.winner, guess.merge_flags) == ("ordinary", "--no-patch-rope")
    assert guess.best == guess.separate
    assert guess.best_2d.loss > guess.separate.loss
    assert guess.winner_is_clear
    assert not guess.ratio_is_clear


def test_what_the_adapter_learnt_is_compared_on_the_base_itself(base: Path, lora: Path) -> None:
    checkpoint = read_base(str(base))
    adapters = read_adapters([lora], checkpoint)
    model = merged_model(checkpoint, adapters, spec_for(None))
    samples = [written(model, spec_for(None), seed, branches=1) for seed in range(4)]
    sample = Sample(tuple(sample.branches[0] for sample in samples))
    learnt = guess_positions(checkpoint, adapters, [sample]).learnt
    assert learnt is not None
    separate = spec_for(None, visibility="isolated")
    expected = branch_losses(merged_model(checkpoint, (), separate), sample, separate)
    assert learnt.base_alone == pytest.approx(sum(expected) / learnt.tokens)
    assert learnt.text
    assert learnt.base_alone > learnt.alone


def test_the_limit_of_time_holds_for_loading_and_scoring(base: Path, lora: Path) -> None:
    """On a clock that advances by a second whenever it is read."""
    checkpoint = read_base(str(base))
    adapters = read_adapters([lora], checkpoint)
    model = merged_model(checkpoint, adapters, spec_for(0.5))
    samples = [written(model, spec_for(0.5), seed) for seed in range(8)]
    ticks = itertools.count()
    guess = guess_positions(checkpoint, adapters, samples, seconds=80.0, clock=lambda: float(next(ticks)))
    assert guess.cut
    assert guess.seconds <= 80.0
    assert guess.tokens < guess.text_tokens == 8 * 3 * NEW
    assert guess.best.ratio == 0.5


def test_a_guess_that_the_text_does_not_support_is_not_clear(tmp_path: Path) -> None:
    """The slowest frequencies hardly rotate within a short text, whatever position rotates them."""
    base = write_base(tmp_path / "base", CONFIGS["qwen3 with wide heads"])
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base)))
    guess = guess_of_own_text(base, lora, spec_for(0.125, 1))
    assert not guess.ratio_is_clear
    assert not guess.stride_is_clear
    same = [score for score in guess.scores if (score.ratio, score.branch_stride) == (0.125, 1)]
    assert same[0].tied


def test_the_model_in_memory_is_the_merged_one(base: Path, lora: Path) -> None:
    checkpoint, spec = read_base(str(base)), spec_for(0.5, 64)
    model = merged_model(checkpoint, read_adapters([lora], checkpoint), spec)
    layout = build_layout([[5, 6, 7, 8], [9, 10], [11, 12, 13]], spec, [20, 21])
    expected = stock_logits(base, torch.load(lora), list(spec.pair_indices), layout)
    with torch.inference_mode():
        found = model(
            input_ids=torch.tensor(layout.ids)[None],
            position_ids=torch.tensor(layout.positions)[None],
            pos2d=torch.tensor(layout.pos2d)[None],
            attention_mask=torch.tensor(layout.mask())[None, None],
        ).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=logits_bound(expected))


def test_the_loss_is_that_of_the_completion_tokens_after_their_branch(base: Path, lora: Path) -> None:
    checkpoint, spec = read_base(str(base)), spec_for(1.0)
    model = merged_model(checkpoint, read_adapters([lora], checkpoint), spec)
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    layout = build_layout(rows, spec)
    logits = stock_logits(base, torch.load(lora), list(spec.pair_indices), layout)[0]
    chances = torch.tensor(logits).log_softmax(-1)
    # Flat order is 5 9 6 10 7 11 8: 7 in slot 4 predicts 8, 9 in slot 1 predicts 10, and 10 in slot 3 predicts 11.
    expected = [-float(chances[4, 8]), -float(chances[1, 10] + chances[3, 11])]
    sample = Sample((Branch((5, 6, 7, 8), 3), Branch((9, 10, 11))))
    # Log probabilities are off by twice what logits are.
    np.testing.assert_allclose(branch_losses(model, sample, spec), expected, rtol=2 * LOGITS)


def test_ratios_that_give_the_same_frequencies_are_tried_once() -> None:
    assert distinct_ratios(4) == {0.25: 1, 0.5: 2, 0.75: 3, 1.0: 4}
    assert list(distinct_ratios(32).values()) == [4, 8, 12, 16, 20, 24, 28, 32]


def test_error_comes_from_the_spread_between_branches() -> None:
    counts = np.array([10.0, 10.0, 20.0])
    reference = np.array([20.0, 21.0, 40.0])
    assert paired_difference(reference + 0.5 * counts, reference, counts) == (0.5, 0.0)
    mean, error = paired_difference(np.array([21.0, 24.0, 44.0]), reference, counts)
    # Differences less 0.2 a token are -1, 1 and 0; the error is sqrt((1 + 1) * 3 / 2) of 40 tokens.
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(3**0.5 / 40)


def score(ratio: float | None, stride: int | None, difference: float, error: float = 0.01, tokens: int = 100) -> Score:
    pairs = 0 if ratio is None else round(32 * ratio)
    return Score(ratio, pairs, stride, tokens, 1.0 + difference, difference, error, difference <= 2 * error)


def test_the_trainers_defaults_are_chosen_among_ties() -> None:
    low = score(1.0, 64, 0.0)
    assert choose([low, score(1.0, 128, 0.01), score(0.5, 128, 0.5)]).branch_stride == 128
    assert choose([low, score(1.0, 128, 0.3)]) == low
    assert choose([low, score(0.5, 256, 0.01), score(0.5, 128, 0.3)]).ratio == 0.5
    assert choose([low, score(0.5, 128, 0.01, tokens=20)]) == low
    assert choose([score(None, None, 0.0), score(0.25, 128, 0.1)]).pairs == 0
    assert merge_flags(low) == "--rope-2d-ratio 1.0 --branch-stride 64"
    assert merge_flags(score(None, None, 0.0)) == "--no-patch-rope"


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(base)


def samples_of(tmp_path: Path, tokenizer: Any, text: str, **limits: int) -> list[Sample]:
    (tmp_path / "text").write_text(text, encoding="utf-8")
    return read_samples(tmp_path / "text", tokenizer, **limits)


def texts(sample: Sample, tokenizer: Any) -> list[tuple[str, str]]:
    """Prompt and completion of every branch."""
    return [(tokenizer.decode(b.ids[: b.start]), tokenizer.decode(b.ids[b.start :])) for b in sample.branches]


def test_paragraphs_become_branches_four_to_a_sequence(tmp_path: Path, tokenizer: Any) -> None:
    samples = samples_of(tmp_path, tokenizer, "one\nmore\n\n\n\ntwo\n \nthree\n\nfour\n\nfive\n\nsix\n")
    assert [len(sample.branches) for sample in samples] == [4, 2]
    assert texts(samples[0], tokenizer)[:2] == [("o", "ne\nmore"), ("t", "wo")]


def test_lines_of_every_form(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {"branches": ["alpha", {"text": "beta", "answer_offset": 2}], "main": "all"},
        {"branches": ["only one is skipped"]},
        {"prompt": "hi", "answer": "yes"},
        {"messages": turns},
        {"q": "hi", "a": "yes", "end": "stop"},
        {"text": "gamma"},
    ]
    first, second = samples_of(tmp_path, tokenizer, "\n".join(map(json.dumps, rows)))
    assert tokenizer.decode(first.context) == "all"
    assert texts(first, tokenizer) == [("a", "lpha"), ("be", "ta")]
    assert texts(second, tokenizer) == [*[("<user>hi\n<assistant>", "yes")] * 3, ("g", "amma")]


def test_a_quotation_is_a_paragraph_and_no_more_lines_are_read_than_needed(tmp_path: Path, tokenizer: Any) -> None:
    assert texts(samples_of(tmp_path, tokenizer, '"one"\n\ntwo')[0], tokenizer)[0] == ('"', 'one"')
    rows = "\n".join([json.dumps({"text": "x" * 100})] * 16 + ["not JSON"])
    assert len(samples_of(tmp_path, tokenizer, rows, limit=400)) == 1


def test_branches_are_cut_and_the_text_is_limited(tmp_path: Path, tokenizer: Any) -> None:
    long = "\n\n".join(["x" * 300] * 40)
    assert {len(b.ids) for sample in samples_of(tmp_path, tokenizer, long) for b in sample.branches} == {BRANCH_TOKENS}
    assert len(samples_of(tmp_path, tokenizer, long, limit=8 * BRANCH_TOKENS)) == 2
    # A branch must have completion tokens after the cut.
    question = json.dumps({"prompt": "x" * 300, "answer": "no"})
    with pytest.raises(InputError, match="no two branches"):
        samples_of(tmp_path, tokenizer, f"{question}\n{question}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one paragraph\nonly", "no two branches"),
        ("", "no two branches"),
        ('{"text": "a b"}\n{"text": ', "line 2 is not JSON"),
        ('{"title": "a b"}', "line 1 has an unknown form"),
        ('{"branches": "a b"}', "branches is not a list"),
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "line 1: a turn has no content"),
    ],
)
def test_texts_that_cannot_be_laid_out(tmp_path: Path, tokenizer: Any, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        samples_of(tmp_path, tokenizer, text)


def test_chat_templates_that_are_missing_or_refuse(tmp_path: Path, base: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    rows = "\n".join([json.dumps({"prompt": "hi", "answer": "yes"})] * 2)
    tokenizer.chat_template = None
    assert texts(samples_of(tmp_path, tokenizer, rows)[0], tokenizer) == [("hi\n", "yes")] * 2
    tokenizer.chat_template = "{{ raise_exception('only systems') }}"
    with pytest.raises(InputError, match=r"line 1: these turns do not fit .* only systems"):
        samples_of(tmp_path, tokenizer, rows)


def test_the_command_shows_flags_and_their_reliability(call: Call, base: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n\n".join(f"paragraph {n} " * 3 for n in range(8)), encoding="utf-8")
    flags = ["inspect", lora, "--base-model", base, "--guess-ratio", "--text", tmp_path / "text"]
    result = call(*flags)
    assert result.exit_code == 0, result.output
    facts = json.loads(call(*flags, "--json").stdout)["guess"]
    assert f"merge flags: {facts['merge_flags']}" in result.stdout
    assert ("ordinary positions win" in result.stdout) is (facts["winner"] == "ordinary")
    if facts["winner"] != "ordinary":
        assert ("does not tell apart the ratios" in result.stdout) is not facts["ratio_is_clear"]
        assert ("does not tell apart the strides" in result.stdout) is not facts["stride_is_clear"]
    assert (facts["sequences"], facts["branches"], facts["cut"]) == (2, 8, False)
    assert len(facts["scores"]) >= 1 + len(distinct_ratios(12)) + 2 * 4


def test_guessing_needs_a_base_and_a_text(lora: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give `base_model`"):
        exporter.inspect(lora, guess_ratio=True, text="text")
    with pytest.raises(UsageError, match="a text like the training data"):
        exporter.inspect(lora, base_model=base, guess_ratio=True)
    with pytest.raises(UsageError, match="give both"):
        exporter.inspect(lora, base_model=base, text="text")
    with pytest.raises(InputError, match=r"absent\.txt cannot be read"):
        exporter.inspect(lora, base_model=base, guess_ratio=True, text=tmp_path / "absent.txt")
