"""Answers to completion requests as JSON: all at once or in chunks, with the prompt where that is asked for."""

from collections.abc import Sequence
from typing import Any

from pos2d.runtime.http.answers import RunningAnswer
from pos2d.runtime.http.choices import FINISH, branch_info, head, sse
from pos2d.runtime.http.connections import DONE
from pos2d.runtime.http.json_bytes import json_bytes
from pos2d.runtime.http.token_texts import TokenTexts, json_number
from pos2d.runtime.text.completions import Event
from pos2d.text_files import json_line

KIND = "text_completion"
Top = Sequence[tuple[int, float]]


class LogprobLists:
    """The lists of ``logprobs``; ``text_offset`` counts the characters of the tokens before."""

    def __init__(self, tokens: TokenTexts, offset: int = 0) -> None:
        self._tokens, self.offset = tokens, offset
        self.lists: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }

    def add(self, token: int | None, logprob: float | None, top: Top) -> None:
        """Add a token; None is an end token, whose text is not shown, and the first token has no log probability.

        Two tokens never have the same text, unless the vocabulary says so; the more likely one then stays.
        """
        text = "" if token is None else self._tokens.exact(token)
        likely: dict[str, float] | None = None
        if logprob is not None and token is not None:
            likely = {}
            for other, value in (*top, (token, logprob)):
                likely.setdefault(self._tokens.exact(other), json_number(value))
        self.lists["tokens"].append(text)
        self.lists["token_logprobs"].append(None if logprob is None else json_number(logprob))
        self.lists["top_logprobs"].append(likely)
        self.lists["text_offset"].append(self.offset)
        self.offset += len(text)


class CompletionChunks:
    """The texts of all choices as they are written; ``echo_only`` leaves out what was generated."""

    def __init__(
        self, answer: RunningAnswer, model: str, tokens: TokenTexts, *, include_usage: bool, echo_only: bool
    ) -> None:
        self._answer, self._tokens = answer, tokens
        self._include_usage, self._echo_only = include_usage, echo_only
        self._head = head(answer, KIND, model)
        self._begin = f'data: {json_line(self._head)[:-1]}, "choices": [{{"index": '
        self._end = "}]" + (', "usage": null}\n\n' if include_usage else "}\n\n")
        self._wants_logprobs = answer.plan.sampling.logprobs
        self._offsets = [0] * answer.choices
        self._has_begun = [not answer.plan.echoes] * answer.choices

    def first(self) -> bytes:
        """Where the branches of a request stand; nothing for other requests."""
        info = branch_info(self._answer.plan)
        return sse(self._head | {"choices": []} | info) if info else b""

    def step(self, events: Sequence[Event]) -> bytes:
        written = []
        for event in events:
            text, logprobs = self.part(event)
            if text or logprobs or event.finish_reason is not None:
                finish = "null" if event.finish_reason is None else f'"{self.finish(event)}"'
                written.append(
                    f'{self._begin}{event.branch}, "text": {json_line(text)}, '
                    f'"logprobs": {json_line(logprobs) if logprobs else "null"}, "finish_reason": {finish}{self._end}'
                )
        return json_bytes("".join(written))

    def last(self) -> bytes:
        if not self._include_usage:
            return DONE
        return sse(self._head | {"choices": [], "usage": self.usage()}) + DONE

    def part(self, event: Event) -> tuple[str, dict[str, list[Any]] | None]:
        """The text and the log probabilities that an event adds to its choice."""
        choice = event.branch
        found = LogprobLists(self._tokens, self._offsets[choice])
        text = ""
        if not self._has_begun[choice]:
            self._has_begun[choice] = True
            job = choice // self._answer.plan.per_job
            text = self._answer.plan.echoes[job]
            self._add_prompt(found, job)
        if not self._echo_only:
            text += event.text
            self._add_event(found, event)
        self._offsets[choice] = found.offset
        return text, found.lists if self._wants_logprobs and found.lists["tokens"] else None

    def _add_prompt(self, found: LogprobLists, job: int) -> None:
        scores = self._answer.prompt_scores(job)
        if not self._wants_logprobs or scores is None:
            return
        ids = self._answer.plan.jobs[job].layout.ids.tolist()
        tops = scores.top or [()] * len(ids)
        for token, logprob, top in zip(ids, scores.logprobs, tops, strict=True):
            found.add(token, logprob, top)

    def _add_event(self, found: LogprobLists, event: Event) -> None:
        """Add the token of an event. An end token counts as one: readers of ``echo`` cut one token off the end."""
        if self._wants_logprobs and (event.token is not None or event.finish_reason == "stop"):
            found.add(event.token, event.logprob, event.top_logprobs or ())

    def finish(self, event: Event) -> str:
        """The finish reason of an event that has one."""
        return "length" if self._echo_only else FINISH[event.finish_reason or "stop"]

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens."""
        if self._echo_only:
            self._answer.completion_tokens = 0
        return self._answer.usage()

    async def whole(self) -> bytes:
        """The complete answer."""
        choices: list[dict[str, Any]] = [
            {"index": index, "text": "", "logprobs": None, "finish_reason": "stop"}
            for index in range(self._answer.choices)
        ]
        async for events in self._answer.steps():
            for event in events:
                text, logprobs = self.part(event)
                choice = choices[event.branch]
                choice["text"] += text
                choice["logprobs"] = _joined(choice["logprobs"], logprobs)
                if event.finish_reason is not None:
                    choice["finish_reason"] = self.finish(event)
        body = self._head | {"choices": choices, "usage": self.usage()} | branch_info(self._answer.plan)
        return json_bytes(json_line(body))


def _joined(before: dict[str, list[Any]] | None, new: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    if before is None or new is None:
        return before or new
    for name, values in new.items():
        before[name] += values
    return before
