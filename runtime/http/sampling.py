"""From the fields of a request to the sampling options of the engine."""

import secrets
from collections.abc import Mapping
from typing import Any

from pos2d.errors import UsageError
from pos2d.runtime.engine.sampling import NARROWING
from pos2d.runtime.http.errors import refusal
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.schemas.chat import ChatRequest
from pos2d.runtime.http.schemas.completions import CompletionRequest
from pos2d.runtime.http.schemas.fields import Extended, JsonObject, JsonSchema, ResponseFormat
from pos2d.runtime.http.schemas.responses import LOGPROBS, ResponseRequest, TextSchema
from pos2d.runtime.http.service import Service
from pos2d.runtime.text.options import RequestOptions, request_options

# Fields that have the name of the option.
SAME_NAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "min_new_tokens",
    "frequency_penalty",
    "presence_penalty",
)
OBJECT: Mapping[str, Any] = {"type": "object"}
# Seeds that are drawn stay below the numbers that JavaScript has as integers.
DRAWN_SEEDS = 2**53


def chat_sampling(body: ChatRequest) -> dict[str, Any]:
    """The options of a chat request, by their names in :class:`pos2d.runtime.engine.sampling.Sampling`."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RefusedError(400, "`max_tokens` and `max_completion_tokens` differ; leave one of them out", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise RefusedError(400, "`top_logprobs` has no effect without `logprobs`; leave it out", "top_logprobs")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _extended(body) | {
        "max_new_tokens": limit,
        "logprobs": body.logprobs or None,
        "top_logprobs": body.top_logprobs or None,
        "chat_template_kwargs": body.chat_template_kwargs or None,
    }


def completion_sampling(body: CompletionRequest) -> dict[str, Any]:
    """The options of a completion request; one with ``max_tokens`` 0 only echoes, and generates a token unseen."""
    if body.max_tokens == 0 and not body.echo:
        raise RefusedError(400, "`max_tokens` must be at least 1, except with `echo`", "max_tokens")
    return _extended(body) | {
        "max_new_tokens": None if body.max_tokens is None else max(1, body.max_tokens),
        "logprobs": None if body.logprobs is None else True,
        "top_logprobs": body.logprobs or None,
        "ignore_chat_template": True,
    }


def response_sampling(body: ResponseRequest) -> dict[str, Any]:
    """The options of a request to ``/v1/responses``."""
    wants_logprobs = bool(body.include)
    if body.top_logprobs and not wants_logprobs:
        raise RefusedError(400, f"`top_logprobs` has no effect without `include` {[LOGPROBS]}", "top_logprobs")
    form = body.text.format if body.text else None
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_new_tokens": body.max_output_tokens,
        "logprobs": wants_logprobs or None,
        "top_logprobs": body.top_logprobs or None,
        "json_schema": form.json_schema if isinstance(form, TextSchema) else json_schema_of(form),
    }


def _extended(body: Extended) -> dict[str, Any]:
    if body.visibility and not body.branches:
        raise RefusedError(400, "`visibility` has no effect without `branches`; leave it out", "visibility")
    if body.branches and (body.n or 1) > 1:
        raise RefusedError(400, "`n` and `branches` exclude each other; leave one of them out", "n")
    if body.stream_options and not body.stream:
        raise RefusedError(400, "`stream_options` has no effect without `stream`; leave it out", "stream_options")
    return {name: getattr(body, name) for name in SAME_NAME} | {
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or None,
        "seed": body.seed,
        "logit_bias": body.logit_bias or None,
        "json_schema": json_schema_of(body.response_format),
        "visibility": body.visibility,
    }


def json_schema_of(response_format: ResponseFormat | None) -> Mapping[str, Any] | None:
    """The JSON schema that ``response_format`` asks for, or None."""
    if isinstance(response_format, JsonObject):
        return OBJECT
    return response_format.json_schema.json_schema if isinstance(response_format, JsonSchema) else None


def resolve(service: Service, given: Mapping[str, Any], names: Mapping[str, str], answers: int = 1) -> RequestOptions:
    """The options of a request for ``answers`` answers of each prompt; without a seed, one is drawn.

    ``names`` are the request's names of options.

    Raises:
        RefusedError: a value that is refused, or several answers that would be equal.
    """
    values = {name: value for name, value in given.items() if value is not None}
    values.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
    if values.get("temperature") == 0:  # the most likely token is in every narrower choice
        values = {name: value for name, value in values.items() if name not in NARROWING}
    try:
        options = request_options(service.artifact.path, values, service.defaults)
    except UsageError as error:
        raise refusal(error, names=names) from None
    if answers > 1 and options.sampling.temperature == 0:
        raise RefusedError(
            400, f"greedy decoding would give {answers} equal answers; give a `temperature` above 0, or `n` 1", "n"
        )
    return options
