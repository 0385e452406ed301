"""Options that count the tokens of an answer or name tokens, and the most likely tokens beside the one taken."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from pos2d import runtime
from pos2d.errors import UsageError
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.text.completions import Event

VOCABULARY = 40


@pytest.mark.parametrize("seed", range(12))
def test_penalties_and_biases_are_what_their_definitions_say(seed: int) -> None:
    """Bias, then repetition over prompt and answer, then OpenAI's formula over the answer alone, then temperature."""
    draw = np.random.default_rng(seed)
    frequency, presence = draw.uniform(-2, 2, size=2)
    bias = {int(token): float(draw.uniform(-100, 100)) for token in draw.choice(VOCABULARY, 5, replace=False)}
    prompt, answer = draw.integers(VOCABULARY, size=9).tolist(), draw.integers(VOCABULARY, size=30).tolist()
    options = Sampling(
        temperature=0.7,
        repetition_penalty=1.3,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias if seed % 2 else {str(token): value for token, value in bias.items()},
    )
    sampler = Sampler(options, prompt_ids=prompt)
    for token in answer:
        sampler.add(token)
    logits = draw.normal(scale=3, size=VOCABULARY).astype(np.float32)
    before = logits.copy()
    counts = Counter(answer)
    expected = []
    for token, logit in enumerate(logits.astype(np.float64)):
        logit += bias.get(token, 0.0)
        if token in {*prompt, *answer}:
            logit = logit / 1.3 if logit > 0 else logit * 1.3
        logit -= frequency * counts[token] + presence * (counts[token] > 0)
        expected.append(logit / 0.7)
    np.testing.assert_allclose(sampler.processed(logits), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)


def test_penalties_change_greedy_answers(talker: runtime.Model) -> None:
    plain, penalised = (
        talker.generate("one", max_new_tokens=40, frequency_penalty=value)[0].token_ids for value in (0.0, 2.0)
    )
    assert max(Counter(penalised).values()) < max(Counter(plain).values())
    (banned,) = talker.generate("one", max_new_tokens=40, logit_bias=dict.fromkeys(plain, -100))
    assert not {*banned.token_ids} & {*plain}
    (forced,) = talker.generate_ids([[1, 2]], max_new_tokens=5, logit_bias={7: 100}, ignore_eos=True)
    assert forced == [7] * 5


def test_biases_of_tokens_that_the_model_does_not_have_are_refused(talker: runtime.Model) -> None:
    options: dict[str, Any] = {"logit_bias": {300: 1.0}}
    words = "`logit_bias` has token 300, which is outside the vocabulary of 300"
    for ask in (
        lambda: talker.generate("one", **options),
        lambda: talker.conversation(**options),
        lambda: talker.generate_ids([[1]], **options),
    ):
        with pytest.raises(UsageError, match=words):
            ask()


def test_the_most_likely_tokens_are_those_of_the_models_own_logits(talker: runtime.Model) -> None:
    """Best first, whatever else the options ask for; of equal ones the smaller id."""
    options: dict[str, Any] = {"temperature": 1.5, "repetition_penalty": 1.5, "logit_bias": {9: 100}, "seed": 3}
    events = list(talker.stream("one", max_new_tokens=6, top_logprobs=4, **options))
    (answer,) = talker.generate("one", max_new_tokens=6, logprobs=True, **options)
    assert answer.logprobs == tuple(event.logprob for event in events)
    ids = talker.tokenizer("<user>one\n<assistant>").input_ids
    for event in events:
        assert event.token is not None
        row = talker.logits([ids])[0, -1].astype(np.float64)
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        best = np.argsort(-expected, kind="stable")[:4].tolist()
        assert event.top_logprobs is not None
        assert [token for token, _ in event.top_logprobs] == best
        np.testing.assert_allclose([logprob for _, logprob in event.top_logprobs], expected[best], atol=1e-4)
        ids.append(event.token)


@pytest.mark.parametrize("count", [1, 3, 5, 20])
def test_equal_logits_are_listed_by_their_ids(count: int) -> None:
    logits = np.array([1, 3, 3, 0, 3, 3, 2, 1], dtype=np.float32)
    top = Sampler(Sampling(top_logprobs=count)).choose(logits).top_logprobs
    assert [token for token, _ in top or ()] == [1, 2, 4, 5, 6, 0, 7, 3][:count]


def test_every_command_has_them(call: Callable[..., Result], talking: Path, tmp_path: Path) -> None:
    """``run`` with either kind of JSON, and records of ``batch``; a bias may stand in a file."""
    (tmp_path / "bias.json").write_text('{"7": 100}', encoding="utf-8")
    flags = ["-n", "3", "--top-logprobs", "2", "--logit-bias", f"@{tmp_path / 'bias.json'}"]
    (answer,) = runtime.load(talking / "onnx").generate("one", max_new_tokens=3, top_logprobs=2, logit_bias={"7": 100})
    as_json = json.loads(json.dumps(answer.top_logprobs))
    assert answer.token_ids == (7, 7, 7)
    assert len(answer.logprobs or ()) == 3
    report = json.loads(call("run", talking / "onnx", "-p", "one", "--json", *flags).stdout)
    assert report["completions"][0]["top_logprobs"] == as_json
    assert report["sampling"]["logit_bias"] == {"7": 100}
    assert "logit_bias" in report["settings"]
    lines = call("run", talking / "onnx", "-p", "one", "--jsonl", *flags).stdout.splitlines()
    assert [json.loads(line)["top_logprobs"] for line in lines] == as_json
    line = {"prompt": "one", "max_new_tokens": 3, "top_logprobs": 2, "logit_bias": {"7": 100}, "frequency_penalty": 1}
    (tmp_path / "in.jsonl").write_text(json.dumps(line), encoding="utf-8")
    runtime.batch(talking / "onnx", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (completion,) = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["completions"]
    assert completion["top_logprobs"] == as_json
    assert completion["logprobs"] == list(answer.logprobs or ())


def test_answers_of_one_seed_differ_and_are_the_same_next_time(talker: runtime.Model) -> None:
    """Branches that continue one text: each has the stream of its own number, whatever stands beside it."""

    def answers(count: int, seed: int) -> list[str]:
        events: list[Event] = list(
            talker.stream(["one"] * count, temperature=1.0, seed=seed, max_new_tokens=12, visibility="isolated")
        )
        return ["".join(event.text for event in events if event.branch == branch) for branch in range(count)]

    first = answers(6, 5)
    assert len({*first}) == 6
    assert answers(6, 5) == first
    assert not {*answers(6, 6)} & {*first}
