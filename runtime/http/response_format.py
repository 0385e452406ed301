"""Answers to ``/v1/responses`` as JSON: all at once, or as the events that OpenAI's client knows."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from pos2d.runtime.http.answers import RunningAnswer
from pos2d.runtime.http.choices import token_logprob
from pos2d.runtime.http.json_bytes import json_bytes
from pos2d.runtime.http.schemas.responses import ResponseRequest
from pos2d.runtime.http.token_texts import TokenTexts
from pos2d.runtime.text.completions import Event
from pos2d.text_files import json_line


class ResponseEvents:
    """The events of a stream, which are numbered; the answer is one message with one text."""

    def __init__(self, answer: RunningAnswer, body: ResponseRequest, model: str, tokens: TokenTexts) -> None:
        self._answer, self._body, self._model, self._tokens = answer, body, model, tokens
        self._created = int(time.time())
        self._message_id = f"msg_{secrets.token_hex(16)}"
        self._number = 0
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._is_cut = False
        self._place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def first(self) -> bytes:
        message = self._message("in_progress") | {"content": []}
        return b"".join(
            [
                self._event("response.created", response=self._response("in_progress")),
                self._event("response.in_progress", response=self._response("in_progress")),
                self._event("response.output_item.added", output_index=0, item=message),
                self._event("response.content_part.added", **self._place, part=self._part()),
            ]
        )

    def step(self, events: Sequence[Event]) -> bytes:
        written = []
        for event in events:
            logprobs = self._add(event)
            if event.text or logprobs:
                written.append(
                    self._event("response.output_text.delta", **self._place, delta=event.text, logprobs=logprobs)
                )
        return b"".join(written)

    def last(self) -> bytes:
        status = self._status()
        part = self._part()
        return b"".join(
            [
                self._event("response.output_text.done", **self._place, text=part["text"], logprobs=part["logprobs"]),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=self._message(status)),
                self._event(f"response.{status}", response=self._response(status)),
            ]
        )

    async def whole(self) -> bytes:
        """The complete answer."""
        async for events in self._answer.steps():
            for event in events:
                self._add(event)
        return json_bytes(json_line(self._response(self._status())))

    def _add(self, event: Event) -> list[dict[str, Any]]:
        """Take the text of an event over; the value is its log probability, if the request wants it."""
        self._text.append(event.text)
        self._is_cut = event.finish_reason == "length"
        found = token_logprob(event, self._tokens) if self._answer.plan.sampling.logprobs else None
        self._logprobs += [found] if found else []
        return [found] if found else []

    def _status(self) -> str:
        return "incomplete" if self._is_cut else "completed"

    def _event(self, kind: str, **facts: Any) -> bytes:
        body = {"type": kind, **facts, "sequence_number": self._number}
        self._number += 1
        return json_bytes(f"event: {kind}\ndata: {json_line(body)}\n\n")

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": "".join(self._text), "annotations": [], "logprobs": self._logprobs}

    def _message(self, status: str) -> dict[str, Any]:
        facts = {"id": self._message_id, "type": "message", "role": "assistant", "status": status}
        return facts | {"content": [self._part()]}

    def _response(self, status: str) -> dict[str, Any]:
        body, sampling, done = self._body, self._answer.plan.sampling, status != "in_progress"
        form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        return {
            "id": self._answer.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": sampling.max_new_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": [self._message(status)] if done else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
