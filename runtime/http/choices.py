"""The choices of a complete answer, and the parts of JSON that several routes write."""

import time
from collections.abc import Sequence
from typing import Any

from pos2d.runtime.http.answers import RunningAnswer
from pos2d.runtime.http.json_bytes import json_bytes
from pos2d.runtime.http.plans import Plan, context_size
from pos2d.runtime.http.token_texts import TokenTexts, json_number
from pos2d.runtime.text.completions import Event
from pos2d.text_files import json_line

# What clients of OpenAI see for the finish reasons of the engine.
FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


def head(answer: RunningAnswer, kind: str, model: str) -> dict[str, Any]:
    """The keys with which every body of an answer begins."""
    return {"id": answer.id, "object": kind, "created": int(time.time()), "model": model}


def branch_info(plan: Plan) -> dict[str, Any]:
    """The key ``pos2d`` of a request with ``branches``, or nothing."""
    if not plan.has_branches:
        return {}
    layout = plan.jobs[0].layout
    places = []
    for branch in range(len(layout.last)):
        own = layout.owners == branch
        places.append(
            {
                "branch": int(layout.branches[own][0]),
                "time": int(layout.times[own].min()),
                "tokens": int(own.sum()),
            }
        )
    facts = {"visibility": layout.visibility, "context_tokens": context_size(layout), "branches": places}
    return {"pos2d": facts}


async def collected(answer: RunningAnswer) -> list[list[Event]]:
    """The events of every choice."""
    choices: list[list[Event]] = [[] for _ in range(answer.choices)]
    async for events in answer.steps():
        for event in events:
            choices[event.branch].append(event)
    return choices


def text_of(events: Sequence[Event]) -> str:
    """The text of a choice."""
    return "".join(event.text for event in events)


def finish_of(events: Sequence[Event]) -> str:
    """The finish reason of a choice, as OpenAI names it."""
    return FINISH[events[-1].finish_reason or "stop"]


def token_logprob(event: Event, tokens: TokenTexts) -> dict[str, Any] | None:
    """The log probability of a token and of those most likely in its place, in the form of chat completions."""
    if event.token is None or event.logprob is None:
        return None
    top = event.top_logprobs or ()
    return _logprob(event.token, event.logprob, tokens) | {
        "top_logprobs": [_logprob(token, logprob, tokens) for token, logprob in top]
    }


def _logprob(token: int, logprob: float, tokens: TokenTexts) -> dict[str, Any]:
    return {
        "token": tokens.shown(token),
        "logprob": json_number(logprob),
        "bytes": list(tokens.bytes_of(token)),
    }


def sse(body: dict[str, Any]) -> bytes:
    """A body as an event of a stream."""
    return json_bytes(f"data: {json_line(body)}\n\n")
