"""Errors in OpenAI's form: a status, a sentence, and the field of the request that is wrong."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pos2d.errors import InputError, Pos2DError, UsageError
from pos2d.options import nearest
from pos2d.runtime.http.refusals import DEFECT, RefusedError
from pos2d.runtime.serving.jobs import BusyError

# What the routes, and other programs, call the largest number of new tokens.
NEW_TOKENS = ("max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens")
# A longer key of a request is no misspelt field.
LONGEST_NAME = 64


def error_response(error: RefusedError, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a refused request, with further ``headers``."""
    return Response(json.dumps(error.content), error.status, {**(headers or {}), **error.headers}, "application/json")


def refusal(error: Exception, param: str | None = None, names: Mapping[str, str] | None = None) -> RefusedError:
    """An error of the library as a refusal; ``names`` are the request's names of options that have other names here.

    A wrong option is 400 and names itself; input that cannot be answered is 422 and belongs to the field ``param``.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BusyError):
        return RefusedError(429, str(error), code="queue_full", retry_after=error.retry_after)
    message = re.sub(r"`(\w+)`", lambda found: f"`{(names or {}).get(found[1], found[1])}`", str(error))
    if isinstance(error, UsageError):
        named = re.search(r"`(\w+)", message)
        return RefusedError(400, message, named[1] if named else param)
    if isinstance(error, InputError):
        return RefusedError(422, message, param)
    return RefusedError(500, DEFECT)


@contextmanager
def refusing(param: str, names: Mapping[str, str]) -> Iterator[None]:
    """Turn the library's errors of input and options into refusals; see :func:`refusal`.

    Raises:
        RefusedError: in place of InputError and UsageError.
    """
    try:
        yield
    except (InputError, UsageError) as error:
        raise refusal(error, param, names) from None


def invalid(error: RequestValidationError, known: Sequence[str] = ()) -> RefusedError:
    """A body that does not have the declared form: the deepest field that is wrong, and what it must be.

    ``known`` are the fields that the body may have.
    """
    faults = [(_path(fault["loc"], error.body, fault["type"] == "missing"), fault) for fault in error.errors()]
    deepest = max(faults, key=lambda found: len(found[0]))[0]
    meant = _meant(str(deepest[0]), known) if len(deepest) == 1 else ""
    reasons = dict.fromkeys(_reason(fault, meant) for path, fault in faults if path == deepest)
    name = ".".join(map(str, deepest))
    if not name and faults[0][1]["type"] not in ("json_invalid", "too_many_keys"):
        return RefusedError(400, "the body is not a JSON object; send one with `Content-Type: application/json`")
    return RefusedError(400, f"{f'`{name}`' if name else 'the body'} {' or '.join(reasons)}", name or None)


def _meant(wrong: str, known: Sequence[str]) -> str:
    """``; did you mean 'max_tokens'?``, or nothing where no field is similar."""
    if len(wrong) > LONGEST_NAME:
        return ""
    return nearest(wrong, [name for name in NEW_TOKENS if name in known] if wrong in NEW_TOKENS else list(known))


def _path(location: Sequence[Any], body: Any, missing: bool) -> tuple[Any, ...]:
    """The keys and indices of a fault's location; the names of types that pydantic adds to it are left out."""
    path: list[Any] = []
    if location and location[0] != "body":
        return (location[-1],)
    value = body
    for number, part in enumerate(location[1:], 1):
        is_key = isinstance(value, Mapping) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
        elif not (missing and number == len(location) - 1):
            continue
        path.append(part)
    return tuple(path)


def _reason(fault: Mapping[str, Any], meant: str) -> str:
    if fault["type"] == "extra_forbidden":
        return f"is not a field that this server knows{meant or '; leave it out'}"
    if fault["type"] == "json_invalid":
        return "is not JSON"
    if fault["type"] == "missing":
        return "is missing"
    if fault["type"] == "union_tag_not_found":
        return "needs a `type`"
    message = str(fault["msg"])
    return re.sub(r"^(Input|Value|String|List|Dictionary) should ", "should ", message)


def _fields(request: Request) -> list[str]:
    """The fields that the body of the request's route may have."""
    body = getattr(request.scope.get("route"), "body_field", None)
    return list(getattr(body and body.field_info.annotation, "model_fields", ()))


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` a response in OpenAI's form."""

    async def refused(_: Request, error: Exception) -> Response:
        return error_response(refusal(error))

    async def not_valid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid(error, _fields(request)))

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(RefusedError(error.status_code, str(error.detail)), error.headers)

    app.add_exception_handler(Exception, refused)
    app.add_exception_handler(Pos2DError, refused)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, of_http)
