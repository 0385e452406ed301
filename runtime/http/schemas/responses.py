"""``/v1/responses``: the request and the answer. Nothing is stored, so a request has all earlier turns itself."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pos2d.runtime.http.schemas.chat import TokenLogprob
from pos2d.runtime.http.schemas.fields import (
    FIRST,
    MAX_COUNT,
    WHOLE,
    Answer,
    AnyText,
    Body,
    JsonObject,
    Label,
    Labels,
    NamedSchema,
    Off,
    Sampled,
    SomeText,
    Text,
)

LOGPROBS = "message.output_text.logprobs"


class InputPart(Body):
    """A part of a message; ``output_text`` is that of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Annotated[object, Off([])] = None
    prompt_cache_breakpoint: Annotated[object, Off()] = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    """A turn; an earlier answer may be given as it was returned."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], FIRST, Field(min_length=1, max_length=1024)]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Annotated[object, Off()] = None


class TextSchema(NamedSchema):
    """A text that a JSON schema accepts."""

    type: Literal["json_schema"]


class TextOptions(Body):
    """The form of the text."""

    format: Annotated[AnyText | JsonObject | TextSchema, Field(discriminator="type")] | None = None
    verbosity: Annotated[object, Off()] = None


class ResponseRequest(Sampled):
    """One text, or messages, that are answered."""

    input: SomeText | Annotated[list[InputMessage], FIRST, Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    text: TextOptions | None = None
    metadata: Labels | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    parallel_tool_calls: bool | None = None
    access_programs: Annotated[object, Off()] = None
    background: Annotated[object, Off(False)] = None
    background_options: Annotated[object, Off()] = None
    context_management: Annotated[object, Off([])] = None
    conversation: Annotated[object, Off()] = None
    image: Annotated[object, Off()] = None
    max_tool_calls: Annotated[object, Off()] = None
    moderation: Annotated[object, Off()] = None
    previous_response_id: Annotated[object, Off()] = None
    prompt: Annotated[object, Off()] = None
    prompt_cache_options: Annotated[object, Off({})] = None
    prompt_cache_retention: Annotated[object, Off()] = None
    reasoning: Annotated[object, Off({}, {"effort": "none"})] = None
    service_tier: Annotated[object, Off("auto", "default")] = None
    store: Annotated[object, Off(False)] = None
    stream_options: Annotated[object, Off({}, {"include_obfuscation": False})] = None
    tool_choice: Annotated[object, Off("none", "auto")] = None
    tools: Annotated[object, Off([])] = None
    truncation: Annotated[object, Off("disabled")] = None


class OutputText(Answer):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprob]


class OutputMessage(Answer):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputTokensDetails(Answer):
    """Tokens that were in the KV cache already."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer):
    """There are no tokens of reasoning apart from the answer's."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseBody(Answer):
    """An answer with what it was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    background: bool
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str
    tools: Annotated[list[Any], Field(max_length=0)]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
