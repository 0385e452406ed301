"""Log probabilities as clients read them: the texts and bytes of tokens, and the most likely ones beside each."""

import random
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from pos2d.runtime.http.completion_format import LogprobLists
from pos2d.runtime.http.token_texts import TokenTexts
from pos2d.runtime.serving.jobs import Job
from pos2d.runtime.text.completions import Event
from tests.runtime.http.conftest import Server
from tests.tiny_tokenizers import KINDS, random_text, tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    texts = TokenTexts(tokenizer)
    draw = random.Random(0)
    for _ in range(50):
        ids = tokenizer(random_text(draw), add_special_tokens=False).input_ids
        written = b"".join(texts.bytes_of(token) for token in ids).decode(errors="replace")
        whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if kind == "word pieces":  # its decoder removes spaces before marks
            written, whole = written.replace(" ", ""), whole.replace(" ", "")
        assert written.strip() == whole.strip()


def test_tokens_that_are_part_of_a_character_are_told_apart() -> None:
    tokens: Any = SimpleNamespace(exact=lambda token: ["a", "bytes:\\xe2", "bytes:\\xe3"][token])
    found = LogprobLists(tokens)
    found.add(0, None, ())
    found.add(1, -2.0, [(2, -0.5)])
    found.add(2, float("-inf"), [(1, -0.1), (0, -3.0)])
    found.add(None, None, ())
    assert found.lists == {
        "tokens": ["a", "bytes:\\xe2", "bytes:\\xe3", ""],
        "token_logprobs": [None, -2.0, -9999.0, None],
        "top_logprobs": [
            None,
            {"bytes:\\xe3": -0.5, "bytes:\\xe2": -2.0},
            {"bytes:\\xe2": -0.1, "a": -3.0, "bytes:\\xe3": -9999.0},
            None,
        ],
        "text_offset": [0, 1, 11, 21],
    }


class ScoredStream:
    """One answer of two tokens, with the most likely tokens beside each."""

    cached_tokens = 0
    prompt_scores = None
    admitted_at = None

    def cancel(self, branch: int | None = None) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        yield [Event(0, 1, "", -0.5, None, ((1, -0.5), (2, -1.5)))]
        yield [Event(0, 2, "x", -1.0, "length", ((3, -0.25), (2, -1.0)))]


@pytest.fixture
def scored(server: Server, monkeypatch: pytest.MonkeyPatch) -> TokenTexts:
    async def submit(job: Job) -> Any:
        return ScoredStream()

    monkeypatch.setattr(server.engine, "submit", submit)
    return TokenTexts(server.model.tokenizer)


def test_the_most_likely_tokens_stand_beside_each(http: httpx2.Client, scored: TokenTexts) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "one"}], "logprobs": True, "top_logprobs": 2}
    content = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-0.5, -1.0]
    assert [[(top["token"], top["logprob"]) for top in entry["top_logprobs"]] for entry in content] == [
        [(scored.shown(1), -0.5), (scored.shown(2), -1.5)],
        [(scored.shown(3), -0.25), (scored.shown(2), -1.0)],
    ]
    body = http.post("/v1/completions", json={"prompt": "a", "logprobs": 2}).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [
        {scored.exact(1): -0.5, scored.exact(2): -1.5},
        {scored.exact(3): -0.25, scored.exact(2): -1.0},
    ]
