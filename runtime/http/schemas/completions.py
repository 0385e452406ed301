"""``/v1/completions``: the request, and the answer, which is also the form of a chunk."""

from typing import Annotated, Literal

from pydantic import Field

from pos2d.runtime.http.schemas.common import BranchInfo, Usage
from pos2d.runtime.http.schemas.fields import FIRST, MAX_CHOICES, WHOLE, Answer, Extended, Off, SomeText, Text, TokenIds

Several = Field(min_length=1, max_length=MAX_CHOICES)


class CompletionRequest(Extended):
    """Texts, or token ids, that are continued as they are; with ``branches`` the prompt is their context."""

    prompt: (
        Text | TokenIds | Annotated[list[SomeText], FIRST, Several] | Annotated[list[TokenIds], FIRST, Several] | None
    ) = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    best_of: Annotated[object, Off(1)] = None
    suffix: Annotated[object, Off("")] = None


class CompletionLogprobs(Answer):
    """Lists with an entry for each token; the first token of a prompt has no log probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of the answers, or what a chunk adds to it; only the last chunk of an answer has a ``finish_reason``."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Answer):
    """All answers to a request, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    pos2d: BranchInfo | None = None
