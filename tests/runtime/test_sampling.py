"""Sampling: every step is transformers' own, and draws follow the distribution that is left."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pos2d.errors import InputError, UsageError
from pos2d.runtime.engine import logits_processors as change
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import PRESETS, Sampling, generation_defaults, resolve_sampling
from tests.bounds import gamma

LOGITS = np.array([1.0, 2.0, 0.0, -1.0], dtype=np.float32)
VOCABULARY = 300


def random_logits(seed: int) -> np.ndarray:
    """Float64, so that both sides agree on the last digit of a cumulated probability; some have masked tokens."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(scale=draw.uniform(0.5, 6.0), size=VOCABULARY)
    if seed % 2:
        logits[draw.integers(VOCABULARY, size=3)] = -np.inf
    return logits


def by_transformers(processor: LogitsProcessor, logits: np.ndarray, ids: list[int] | None = None) -> np.ndarray:
    found: np.ndarray = processor(torch.tensor([ids or [0]]), torch.tensor(logits)[None])[0].numpy()
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_step_is_that_of_transformers(seed: int) -> None:
    draw = np.random.default_rng(1000 + seed)
    logits: Any = random_logits(seed)
    seen = draw.integers(VOCABULARY, size=20).tolist()
    k, p, penalty = (
        int(draw.integers(1, VOCABULARY + 20)),
        float(draw.uniform(0.01, 0.999)),
        float(draw.uniform(0.5, 2)),
    )
    tied = np.where(np.arange(VOCABULARY) % 3, logits, logits[0])
    np.testing.assert_array_equal(change.keep_top_k(tied, k), by_transformers(TopKLogitsWarper(k), tied))
    for ours, theirs in (
        (change.keep_top_k(logits, k), TopKLogitsWarper(k)),
        (change.keep_top_p(logits, p), TopPLogitsWarper(p)),
        (change.keep_min_p(logits, p), MinPLogitsWarper(p)),
        (change.penalise_repetition(logits, set(seen), penalty), RepetitionPenaltyLogitsProcessor(penalty)),
        (change.suppress(logits, [7, 9]), MinNewTokensLengthLogitsProcessor(len(seen), 1, [7, 9], device="cpu")),
    ):
        np.testing.assert_array_equal(ours, by_transformers(theirs, logits, seen), err_msg=type(theirs).__name__)


@pytest.mark.parametrize("seed", range(24))
def test_top_p_of_many_tokens_keeps_what_sorting_all_of_them_keeps(seed: int) -> None:
    """Whether few tokens or many are kept, and where many are equally likely."""
    draw = np.random.default_rng(seed)
    logits: Any = draw.normal(scale=(0.1, 1.0, 4.0)[seed % 3], size=9000).astype((np.float32, np.float64)[seed % 2])
    if seed % 4 == 1:
        logits = np.round(2 * logits)
    logits[draw.integers(9000, size=50)] = -np.inf
    ids = np.flatnonzero(logits > -np.inf)
    ids = ids[np.argsort(logits[ids], kind="stable")]
    cumulated = np.cumsum(change.probabilities(logits[ids]))
    for p in (
        0.01,
        0.3,
        0.5,
        0.9,
        0.99,
        1 - 1e-9,
        *draw.uniform(size=5).tolist(),
        *(1 - cumulated[-90:-10:4]).tolist(),
    ):
        expected = np.full_like(logits, -np.inf)
        kept = ids[(cumulated > 1 - p) | (np.arange(len(ids)) == len(ids) - 1)]
        expected[kept] = logits[kept]
        np.testing.assert_array_equal(change.keep_top_p(logits, p), expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.7}, {"min_p": 0.01}], ids=str)
def test_draws_are_those_of_numpys_choice(options: dict[str, Any]) -> None:
    """The same tokens for the same seed: outputs that were written before do not change."""
    draw = np.random.default_rng(8)
    sampler = Sampler(Sampling(temperature=0.9, seed=4, **options), (3,))
    expected = np.random.default_rng(np.random.SeedSequence(4, spawn_key=(3,)))
    for _ in range(200):
        logits = draw.normal(scale=3, size=700).astype(np.float32)
        left = sampler.processed(logits)
        ids = np.flatnonzero(left > -np.inf)
        assert sampler.choose(logits).token == ids[expected.choice(len(ids), p=change.probabilities(left[ids]))]


@pytest.mark.parametrize("seed", range(10))
def test_all_of_them_together_are_in_the_same_order(seed: int) -> None:
    options = Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3, min_new_tokens=3)
    logits, seen = random_logits(2 * seed), [3, 4, 5, 5]
    ours = Sampler(options, end_tokens=[11], prompt_ids=seen).processed(logits.astype(np.float32))
    theirs = logits.astype(np.float32)
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        MinNewTokensLengthLogitsProcessor(len(seen), 3, [11], device="cpu"),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    ):
        theirs = by_transformers(processor, theirs, seen)
    # A product and a quotient on either side, two roundings each where a kernel multiplies by the reciprocal.
    np.testing.assert_allclose(ours, theirs, rtol=2 * gamma(4, torch.float32))


def critical_value(freedom: int) -> float:
    """Of chi-square at one in ten thousand (Wilson and Hilferty)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"temperature": 3.0},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_draws_follow_what_is_left(options: dict[str, Any]) -> None:
    """Frequencies of 20,000 draws beside the probabilities, by chi-square."""
    logits = np.random.default_rng(5).normal(scale=2.0, size=20).astype(np.float32)
    sampling = Sampling(**options, seed=11)
    expected = change.probabilities(Sampler(sampling, prompt_ids=[1, 2]).processed(logits))
    count = 20_000
    sampler = Sampler(sampling, prompt_ids=[1, 2])
    drawn = []
    for _ in range(count):
        drawn.append(sampler.choose(logits)[0])
        sampler.seen_tokens = {1, 2}
    found = np.bincount(drawn, minlength=len(logits))
    assert not found[expected == 0].any()
    likely = expected * count >= 5
    statistic = ((found[likely] - expected[likely] * count) ** 2 / (expected[likely] * count)).sum()
    assert statistic < critical_value(int(likely.sum()) - 1)


def test_temperature_0_takes_the_largest() -> None:
    assert {Sampler(Sampling(), (branch,)).choose(LOGITS)[0] for branch in range(50)} == {1}


def test_a_branch_has_random_numbers_of_its_own() -> None:
    def drawn(stream: tuple[int, ...], seed: int = 0) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), stream)
        return [sampler.choose(LOGITS)[0] for _ in range(50)]

    assert drawn((1,)) == drawn((1,))
    assert len({tuple(drawn(stream, seed)) for stream in ((0,), (1,), (1, 0), (1, 1)) for seed in (0, 1)}) == 8


def test_log_probabilities_are_the_models_own() -> None:
    """Whatever narrows the draw, they are those of softmax(logits)."""
    sampler = Sampler(Sampling(temperature=0.3, top_k=2, logprobs=True))
    for _ in range(10):
        token, logprob, _ = sampler.choose(LOGITS)
        expected = float(torch.log_softmax(torch.tensor(LOGITS).double(), 0)[token])
        # Four exponentials, their sum, its logarithm and a difference, of values up to 4.
        assert logprob == pytest.approx(expected, abs=2 * gamma(12, torch.float64))
    assert Sampler(Sampling()).choose(LOGITS)[1] is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"temperature": -1.0}, "`temperature` -1.0 must be 0"),
        ({"temperature": float("nan")}, "`temperature` nan"),
        ({"temperature": 1e-40}, "0.001 to 100"),
        ({"temperature": 10**400}, "0.001 to 100"),
        ({"repetition_penalty": 1e-9}, "0.01 to 100"),
        ({"seed": 2**64}, "in 64 bits"),
        ({"logprobs": "false"}, "must be true or false"),
        ({"temperature": "hot"}, "`temperature` 'hot' must be a number"),
        ({"top_k": -1}, "`top_k` -1"),
        ({"top_k": 2.5}, "`top_k` 2.5 must be a whole number"),
        ({"top_p": 0.0}, "`top_p` 0.0 must be above 0"),
        ({"top_p": 1.1}, "`top_p` 1.1"),
        ({"min_p": 2.0}, "`min_p` 2.0"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` 0.0"),
        ({"seed": -1}, "`seed` -1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` 0 must be at least 1"),
        ({"max_new_tokens": True}, "`max_new_tokens` True"),
        ({"min_new_tokens": 300}, "`min_new_tokens` 300"),
        ({"stop": ("",)}, "empty text"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` 2.1 must be -2 to 2"),
        ({"presence_penalty": -2.1}, "`presence_penalty` -2.1 must be -2 to 2"),
        ({"top_logprobs": 21}, "`top_logprobs` 21 must be 0 to 20"),
        ({"logit_bias": [5]}, "must be a JSON object"),
        ({"logit_bias": {"five": 1}}, "`logit_bias` has the key 'five'"),
        ({"logit_bias": {"-1": 1}}, "`logit_bias` has the key '-1'"),
        ({"logit_bias": {True: 1}}, "`logit_bias` has the key True"),
        ({"logit_bias": {"5": 1, 5: 1}}, "`logit_bias` has the key 5, .* is there twice"),
        ({"logit_bias": {"5": 100.5}}, "`logit_bias` of token 5 is 100.5; it must be a number from -100 to 100"),
        ({"logit_bias": {"5": "1"}}, "`logit_bias` of token 5 is '1'"),
        ({"logit_bias": {"5": float("nan")}}, "`logit_bias` of token 5 is nan"),
        ({"logit_bias": {"5": True}}, "`logit_bias` of token 5 is True"),
        ({"stop": "x"}, "must be a text or several"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**option)


def write_settings(directory: Path, **settings: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def test_defaults_are_the_artifacts_and_flags_win(tmp_path: Path) -> None:
    assert resolve_sampling(tmp_path, {}) == Sampling()
    write_settings(tmp_path, do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert resolve_sampling(tmp_path, {}) == Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert resolve_sampling(tmp_path, {"temperature": 0.2, "seed": 3, "top_k": None}).temperature == 0.2
    assert resolve_sampling(tmp_path, {"temperature": 0.0}).temperature == 0.0
    preset = resolve_sampling(tmp_path, {"preset": "creative", "top_k": 5})
    assert (preset.temperature, preset.top_k, preset.top_p) == (0.8, 5, PRESETS["creative"]["top_p"])


def test_a_configuration_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    assert resolve_sampling(write_settings(tmp_path, temperature=0.6, top_p=0.9), {}) == Sampling()
    repeating = resolve_sampling(write_settings(tmp_path, repetition_penalty=1.1, max_new_tokens=9), {})
    assert repeating == Sampling(repetition_penalty=1.1, max_new_tokens=9)
    assert generation_defaults(write_settings(tmp_path, do_sample=True)) == {"temperature": 1.0, "top_k": 50}


def test_flags_that_nobody_heeds_are_refused(tmp_path: Path) -> None:
    for flags in ({"top_p": 0.9}, {"preset": "chat", "temperature": 0.0, "top_k": 4}):
        with pytest.raises(UsageError, match=r"greedy decoding \(temperature 0\) does not use `top_"):
            resolve_sampling(tmp_path, flags)
    with pytest.raises(UsageError, match="`preset` 'poetry' is not one of factual"):
        resolve_sampling(tmp_path, {"preset": "poetry"})


@pytest.mark.parametrize("settings", ["[]", "{", '{"temperature": "x", "do_sample": true}', '{"max_new_tokens": -1}'])
def test_broken_settings_are_named(tmp_path: Path, settings: str) -> None:
    (tmp_path / "generation_config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config.json cannot be used: .*make the artifact again"):
        resolve_sampling(tmp_path, {})
