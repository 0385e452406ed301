"""What requests ask for, as the limits want to know it before anything is rendered or encoded."""

import json
from collections.abc import Iterable

from pos2d.runtime.http.limits import Demand
from pos2d.runtime.http.sampling import json_schema_of
from pos2d.runtime.http.schemas.chat import ChatRequest, Message
from pos2d.runtime.http.schemas.completions import CompletionRequest
from pos2d.runtime.http.schemas.fields import Extended
from pos2d.runtime.http.schemas.responses import InputMessage, ResponseRequest, TextSchema


def chat_demand(body: ChatRequest) -> Demand:
    """What a chat request asks for."""
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    characters = message_characters(body.messages) + sum(map(len, body.branches or ()))
    new_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _extended(body, characters, new_tokens, "messages", field)


def completion_demand(body: CompletionRequest) -> Demand:
    """What a completion request asks for; of several texts, the longest counts."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
    longest = max((len(prompt) for prompt in prompts if isinstance(prompt, str)), default=0)
    characters = longest + sum(map(len, body.branches or ()))
    new_tokens = None if body.max_tokens is None else max(1, body.max_tokens)
    return _extended(body, characters, new_tokens, "prompt", "max_tokens")


def response_demand(body: ResponseRequest) -> Demand:
    """What a request to ``/v1/responses`` asks for."""
    form = body.text.format if body.text else None
    schema = form.json_schema if isinstance(form, TextSchema) else None
    asked = len(body.input) if isinstance(body.input, str) else message_characters(body.input)
    return Demand(
        branches=1,
        characters=asked + len(body.instructions or ""),
        new_tokens=body.max_output_tokens,
        schema_bytes=0 if schema is None else len(json.dumps(schema)),
        prompt_field="input",
        new_tokens_field="max_output_tokens",
    )


def text_demand(prompt: str, new_tokens: int | None) -> Demand:
    """What a request to ``/generate`` asks for."""
    return Demand(
        branches=1,
        characters=len(prompt),
        new_tokens=new_tokens,
        prompt_field="prompt",
        new_tokens_field="max_new_tokens",
    )


def message_characters(messages: Iterable[Message | InputMessage]) -> int:
    """The number of characters in the contents of messages."""
    contents = [message.content for message in messages]
    return sum(len(c) if isinstance(c, str) else sum(len(part.text) for part in c) for c in contents)


def _extended(
    body: Extended, characters: int, new_tokens: int | None, prompt_field: str, new_tokens_field: str
) -> Demand:
    schema = json_schema_of(body.response_format)
    return Demand(
        branches=len(body.branches) if body.branches else body.n or 1,
        characters=characters,
        new_tokens=new_tokens,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        schema_bytes=0 if schema is None else len(json.dumps(schema)),
        branches_field="branches" if body.branches else "n",
        prompt_field=prompt_field,
        new_tokens_field=new_tokens_field,
    )
