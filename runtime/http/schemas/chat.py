"""``/v1/chat/completions``: the request, the answer, and the chunks of a stream."""

from typing import Annotated, Literal

from pydantic import Field

from pos2d.runtime.http.schemas.common import BranchInfo, Usage
from pos2d.runtime.http.schemas.fields import (
    FIRST,
    MAX_COUNT,
    WHOLE,
    Answer,
    Body,
    Extended,
    Label,
    Labels,
    Off,
    TemplateVariables,
    Text,
)

Finish = Literal["stop", "length"]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], FIRST, Field(min_length=1, max_length=1024)]


class Message(Body):
    """A turn of a conversation; ``developer`` is another name of ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[object, Off()] = None
    refusal: Annotated[object, Off()] = None
    audio: Annotated[object, Off()] = None
    annotations: Annotated[object, Off([])] = None
    tool_calls: Annotated[object, Off([])] = None
    function_call: Annotated[object, Off()] = None


class ChatRequest(Extended):
    """Messages that are answered; the last field that is supported is ``chat_template_kwargs``."""

    messages: Annotated[list[Message], FIRST, Field(max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    metadata: Labels | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    audio: Annotated[object, Off()] = None
    function_call: Annotated[object, Off("none", "auto")] = None
    functions: Annotated[object, Off([])] = None
    modalities: Annotated[object, Off([], ["text"])] = None
    moderation: Annotated[object, Off()] = None
    prediction: Annotated[object, Off()] = None
    prompt_cache_options: Annotated[object, Off({})] = None
    prompt_cache_retention: Annotated[object, Off()] = None
    reasoning_effort: Annotated[object, Off("none")] = None
    service_tier: Annotated[object, Off("auto", "default")] = None
    store: Annotated[object, Off(False)] = None
    tool_choice: Annotated[object, Off("none", "auto")] = None
    tools: Annotated[object, Off([])] = None
    verbosity: Annotated[object, Off()] = None
    web_search_options: Annotated[object, Off()] = None


class TopLogprob(Answer):
    """A token that could have been written; ``bytes`` are those of its text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was written, and those that were most likely in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """The tokens of an answer, or of a chunk."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(Answer):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One of the answers; ``index`` is the branch."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Answer):
    """All answers to a request; ``pos2d`` is there for a request with ``branches``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    pos2d: BranchInfo | None = None


class Delta(Answer):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    """What a chunk adds to the answer of one branch."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(Answer):
    """One event of a stream; ``pos2d`` is in the first one of a request with ``branches``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    pos2d: BranchInfo | None = None
