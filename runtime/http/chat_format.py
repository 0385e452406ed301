"""Answers to chat requests as JSON: all at once, or in chunks.

Chunks are put together from text rather than from objects, since there is one for every token.
"""

from collections.abc import Sequence

from pos2d.runtime.http.answers import RunningAnswer
from pos2d.runtime.http.choices import FINISH, branch_info, collected, finish_of, head, sse, text_of, token_logprob
from pos2d.runtime.http.connections import DONE
from pos2d.runtime.http.json_bytes import json_bytes
from pos2d.runtime.http.token_texts import TokenTexts
from pos2d.runtime.text.completions import Event
from pos2d.text_files import json_line


class ChatChunks:
    """The chunks of a stream; with ``include_usage`` the last one has the usage, and all others have null."""

    def __init__(self, answer: RunningAnswer, model: str, tokens: TokenTexts, include_usage: bool) -> None:
        self._answer, self._tokens, self._include_usage = answer, tokens, include_usage
        self._head = head(answer, "chat.completion.chunk", model)
        self._begin = f'data: {json_line(self._head)[:-1]}, "choices": [{{"index": '
        self._end = "}]" + (', "usage": null}\n\n' if include_usage else "}\n\n")
        self._logprobs = answer.plan.sampling.logprobs

    def first(self) -> bytes:
        """The role of every choice."""
        written = []
        for choice in range(self._answer.choices):
            extra = json_line(branch_info(self._answer.plan))[1:-1] if choice == 0 else ""
            delta = '"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null'
            end = self._end.replace("}]", f"}}], {extra}", 1) if extra else self._end
            written.append(f"{self._begin}{choice}, {delta}{end}")
        return json_bytes("".join(written))

    def step(self, events: Sequence[Event]) -> bytes:
        written = []
        for event in events:
            logprobs = self._logprobs_of(event) if self._logprobs else "null"
            if event.text or logprobs != "null":
                written.append(
                    f'{self._begin}{event.branch}, "delta": {{"content": {json_line(event.text)}}}, '
                    f'"logprobs": {logprobs}, "finish_reason": null{self._end}'
                )
            if event.finish_reason is not None:
                written.append(
                    f'{self._begin}{event.branch}, "delta": {{}}, "logprobs": null, '
                    f'"finish_reason": "{FINISH[event.finish_reason]}"{self._end}'
                )
        return json_bytes("".join(written))

    def last(self) -> bytes:
        if not self._include_usage:
            return DONE
        return sse(self._head | {"choices": [], "usage": self._answer.usage()}) + DONE

    def _logprobs_of(self, event: Event) -> str:
        found = token_logprob(event, self._tokens)
        return "null" if found is None else json_line({"content": [found], "refusal": None})


async def chat_completion(answer: RunningAnswer, model: str, tokens: TokenTexts) -> bytes:
    """The complete answer."""
    choices = []
    for index, events in enumerate(await collected(answer)):
        logprobs = None
        if answer.plan.sampling.logprobs:
            found = [token_logprob(event, tokens) for event in events]
            logprobs = {"content": [entry for entry in found if entry], "refusal": None}
        message = {"role": "assistant", "content": text_of(events), "refusal": None}
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_of(events)})
    body = head(answer, "chat.completion", model) | {"choices": choices, "usage": answer.usage()}
    return json_bytes(json_line(body | branch_info(answer.plan)))
