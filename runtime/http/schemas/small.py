"""The small requests: ``/generate``, ``/tokenize`` and ``/v1/requests/{id}/cancel``."""

from typing import Annotated

from pydantic import Field

from pos2d.runtime.http.schemas.chat import Message
from pos2d.runtime.http.schemas.fields import (
    FIRST,
    MAX_CHOICES,
    MAX_COUNT,
    WHOLE,
    Answer,
    Body,
    Name,
    Off,
    SomeText,
    TemplateVariables,
    Text,
)


class GenerateRequest(Body):
    """The request of the trainer's guide."""

    prompt: SomeText
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] = 512
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.7


class Generated(Answer):
    """The prompt and its continuation, as the guide's program returns them."""

    response: str


class TokenizeRequest(Body):
    """A text or messages, one of them; the two fields before the last are for texts, and the last two for messages."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], FIRST, Field(min_length=1, max_length=4096)] | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Annotated[object, Off(True)] = None
    chat_template_kwargs: TemplateVariables | None = None


class Tokenized(Answer):
    """Token ids, as vLLM returns them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class CancelRequest(Body):
    """Which branch of a request to end; without one, all of them."""

    branch: Annotated[int, Field(ge=0, le=MAX_CHOICES), WHOLE] | None = None


class Cancelled(Answer):
    """The request that was told to end, or its branch."""

    id: str
    branch: int | None
