"""Bodies of responses that several routes have."""

from typing import Literal

from pos2d.runtime.http.schemas.fields import Answer, VisibilityName


class ErrorFacts(Answer):
    """What is wrong; ``param`` is the field of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Every error has this form, which is OpenAI's."""

    error: ErrorFacts


class PromptTokensDetails(Answer):
    """``cached_tokens`` were not read again: they were in the KV cache, or another branch had read them."""

    cached_tokens: int


class Usage(Answer):
    """Numbers of tokens; ``prompt_tokens`` counts the shared context for every branch."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BranchPlace(Answer):
    """Where a branch stands: its branch value, the time of its first token, and its number of tokens."""

    branch: int
    time: int
    tokens: int


class BranchInfo(Answer):
    """How the branches of a request stand side by side."""

    visibility: VisibilityName
    context_tokens: int
    branches: list[BranchPlace]


class ModelFacts(Answer):
    """A model that can be named in requests."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    """The models of the server, of which there is one."""

    object: Literal["list"]
    data: list[ModelFacts]
