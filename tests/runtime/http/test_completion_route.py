"""Completions over HTTP: prompts of every form, echo, and log probabilities as lm-eval reads them."""

from typing import Any

import httpx2
import pytest

from pos2d.runtime.http.schemas.completions import Completion
from tests.runtime.http.conftest import Server, log_softmax
from tests.runtime.http.test_chat_route import QUESTIONS, events_of

PROMPTS = ["one and ", "another one, longer, "]


def complete(http: httpx2.Client, **body: Any) -> Any:
    response = http.post("/v1/completions", json={"max_tokens": 8} | body)
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.content)
    return response.json()


def plain(server: Server, prompts: list[str], **options: Any) -> list[str]:
    options = {"max_new_tokens": 8} | options
    return [server.model.generate(p, ignore_chat_template=True, **options)[0].text for p in prompts]


def test_prompts_of_every_form_are_answered_alone(server: Server, http: httpx2.Client) -> None:
    expected = plain(server, PROMPTS)
    ids = [server.model.tokenizer(prompt).input_ids for prompt in PROMPTS]
    for prompt, texts in (
        (PROMPTS[0], expected[:1]),
        (PROMPTS, expected),
        (ids[1], expected[1:]),
        (ids, expected),
    ):
        body = complete(http, prompt=prompt)
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_several_answers_of_several_prompts(server: Server, http: httpx2.Client) -> None:
    sampled: Any = {"temperature": 1, "seed": 3}
    texts = [choice["text"] for choice in complete(http, prompt=PROMPTS, n=3, **sampled)["choices"]]
    assert len(set(texts)) == 6
    assert [texts[0], texts[3]] == plain(server, PROMPTS, temperature=1.0, seed=3)
    assert texts[3:] == [choice["text"] for choice in complete(http, prompt=PROMPTS[1], n=3, **sampled)["choices"]]


def test_a_stream_of_several_prompts_keeps_them_apart(server: Server, http: httpx2.Client) -> None:
    body = {"prompt": PROMPTS, "max_tokens": 8, "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    chunks = events_of(http.post("/v1/completions", json=body).text)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [prompt + text for prompt, text in zip(PROMPTS, plain(server, PROMPTS), strict=True)]
    assert chunks[-1]["usage"] == complete(http, prompt=PROMPTS)["usage"]


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_has_the_log_probabilities_of_the_prompt(server: Server, http: httpx2.Client, as_ids: bool) -> None:
    """With the fields that lm-eval sends, and cut as it cuts them."""
    ids = [server.model.tokenizer(prompt).input_ids for prompt in PROMPTS]
    body = complete(
        http,
        model="tiny",
        prompt=ids if as_ids else PROMPTS,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    for choice, own, prompt in zip(body["choices"], ids, PROMPTS, strict=True):
        likely = log_softmax(server.model.logits(own)[0])
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        kept = slice(4, -1)
        expected = [row[token] for row, token in zip(likely, own[1:], strict=False)][3:]
        assert found["token_logprobs"][kept] == expected
        assert [max(top.values()) for top in found["top_logprobs"][kept]] == [row.max() for row in likely[3:-1]]
        assert len(found["tokens"]) == len(own) + 1
        assert "".join(found["tokens"][:-1]) == prompt
        assert found["text_offset"][:-1] == list(range(len(prompt)))


def test_an_end_token_counts_as_the_generated_one(server: Server, http: httpx2.Client) -> None:
    """Otherwise a reader of ``echo`` would cut off a token of the prompt."""
    end = server.model.manifest.eos_token_ids[0]
    pairs = [[[first, second] for second in range(256)] for first in range(256)]
    prompt = next(p for row in pairs for p, best in zip(row, next_tokens(server, row), strict=True) if best == end)
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True}
    (choice,) = complete(http, **asked)["choices"]
    assert {len(entries) for entries in choice["logprobs"].values()} == {len(prompt) + 1}
    assert choice["logprobs"]["tokens"][-1] == ""
    assert choice["finish_reason"] == "stop"
    streamed = [
        entry
        for chunk in events_of(http.post("/v1/completions", json=asked | {"stream": True}).text)
        for entry in chunk["choices"][0]["logprobs"]["token_logprobs"]
    ]
    assert streamed == choice["logprobs"]["token_logprobs"]


def next_tokens(server: Server, prompts: list[list[int]]) -> list[int]:
    best: list[int] = server.model.logits(prompts)[:, -1].argmax(axis=-1).tolist()
    return best


def test_echo_alone_generates_nothing(server: Server, http: httpx2.Client) -> None:
    body = complete(http, prompt=PROMPTS[0], max_tokens=0, echo=True, logprobs=0)
    assert body["choices"][0]["text"] == PROMPTS[0]
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(PROMPTS[0])
    assert body["usage"]["completion_tokens"] == 0


def test_branches_share_the_prompt_as_their_context(server: Server, http: httpx2.Client) -> None:
    expected = server.model.generate(QUESTIONS, "Shared. ", max_new_tokens=8, ignore_chat_template=True)
    body = complete(http, prompt="Shared. ", branches=QUESTIONS)
    assert [choice["text"] for choice in body["choices"]] == [answer.text for answer in expected]
    assert body["pos2d"]["context_tokens"] == len("Shared. ")
