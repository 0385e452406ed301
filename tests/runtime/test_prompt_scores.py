"""Scores of given tokens: those that the sampler records where it chooses the same tokens from the same logits."""

from typing import Any

import numpy as np
import pytest
import torch

from pos2d import runtime
from pos2d.runtime.engine import prompt_scores
from pos2d.runtime.engine.prompt_scores import score_tokens
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling

SLOTS, VOCABULARY = 23, 1021


@pytest.fixture
def logits() -> Any:
    draw = np.random.default_rng(3)
    return (draw.normal(scale=8, size=(SLOTS, VOCABULARY))).astype(np.float32)


@pytest.mark.parametrize(("top", "block"), [(0, 1 << 22), (1, 5 * VOCABULARY), (7, 4 * VOCABULARY + 3), (20, 1)])
def test_they_are_bit_by_bit_what_the_sampler_records(
    logits: Any, monkeypatch: pytest.MonkeyPatch, top: int, block: int
) -> None:
    """In blocks of any size, for the likeliest token, for others, and where several are equal."""
    monkeypatch.setattr(prompt_scores, "BLOCK_VALUES", block)
    logits[4] = np.round(logits[4] / 8)
    tokens, expected = [], []
    for slot, row in enumerate(logits):
        temperature = 0.0 if slot % 3 == 0 else 100.0
        choice = Sampler(Sampling(logprobs=True, top_logprobs=top, seed=slot, temperature=temperature)).choose(row)
        tokens.append(choice.token)
        expected.append(choice)
    scores = score_tokens(logits, tokens, top)
    assert scores.logprobs == tuple(choice.logprob for choice in expected)
    assert scores.top == tuple(choice.top_logprobs or () for choice in expected)
    assert scores.is_greedy == tuple(token == int(row.argmax()) for token, row in zip(tokens, logits, strict=True))
    assert any(scores.is_greedy)
    assert not all(scores.is_greedy)


def test_they_are_those_of_log_softmax(logits: Any) -> None:
    tokens = np.random.default_rng(4).integers(VOCABULARY, size=SLOTS)
    expected = torch.log_softmax(torch.tensor(logits).double(), -1)
    np.testing.assert_allclose(
        score_tokens(logits, tokens.tolist()).logprobs, expected[range(SLOTS), tokens], rtol=1e-12
    )
    top = score_tokens(logits, tokens.tolist(), 5).top
    np.testing.assert_array_equal(np.array(top)[..., 0], expected.topk(5).indices)
    np.testing.assert_allclose(np.array(top)[..., 1], expected.topk(5).values, rtol=1e-12)


def test_a_prompts_tokens_have_the_scores_of_an_answer_with_the_same_tokens(talker: runtime.Model) -> None:
    (answer,) = talker.generate("one", max_new_tokens=8, top_logprobs=3)
    prompt = talker.tokenizer("<user>one\n<assistant>").input_ids
    ids = [*prompt, *answer.token_ids]
    scores = score_tokens(talker.logits([ids])[0, :-1], ids[1:], 3)
    count = len(answer.token_ids)
    np.testing.assert_allclose(scores.logprobs[-count:], answer.logprobs or (), atol=1e-4)
    assert all(scores.is_greedy[-count:])
    assert [[token for token, _ in top] for top in scores.top[-count:]] == [
        [token for token, _ in top] for top in answer.top_logprobs or ()
    ]


def test_no_slot_has_no_score(logits: Any) -> None:
    assert score_tokens(logits[:0], [], 3).logprobs == ()
    with pytest.raises(ValueError, match="2 tokens for logits of 3 slots"):
        score_tokens(logits[:3], [1, 2])
