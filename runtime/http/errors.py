"""Errors in OpenAI's form: a status, a sentence, and the field of the request that is wrong."""

import json
import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pos2d.errors import InputError, Pos2DError, UsageError
from pos2d.runtime.serving.jobs import BusyError

MAX_SHOWN = 1000


class RequestError(Exception):
    """A request that is refused."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error, in ASCII: the message may repeat text of the request that UTF-8 does not have."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    shown = param[:MAX_SHOWN] if param else param
    return json.dumps({"error": {"message": message[:MAX_SHOWN], "type": kind, "param": shown, "code": code}}).encode()


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a refused request."""
    fields = dict(headers or {})
    if error.retry_after is not None:
        fields["Retry-After"] = str(max(1, ceil(error.retry_after)))
    body = error_body(error.status, error.message, error.param, error.code)
    return Response(body, error.status, fields, "application/json")


def refusal(error: Exception, param: str | None = None, names: Mapping[str, str] | None = None) -> RequestError:
    """An error of the library as a refusal; ``names`` are the request's names of options that have other names here.

    A wrong option is 400 and names itself; input that cannot be answered is 422 and belongs to the field ``param``.
    """
    if isinstance(error, RequestError):
        return error
    status = getattr(error, "status", None)
    if isinstance(error, Pos2DError) and isinstance(status, int):  # what the guards around the routes refuse
        return RequestError(
            status, str(error), getattr(error, "param", None), retry_after=getattr(error, "retry_after", None)
        )
    if isinstance(error, BusyError):
        return RequestError(429, str(error), code="queue_full", retry_after=error.retry_after)
    message = re.sub(r"`(\w+)`", lambda found: f"`{(names or {}).get(found[1], found[1])}`", str(error))
    if isinstance(error, UsageError):
        named = re.search(r"`(\w+)", message)
        return RequestError(400, message, named[1] if named else param)
    if isinstance(error, InputError):
        return RequestError(422, message, param)
    return RequestError(500, "the request failed; the server's log has the cause")


def invalid(error: RequestValidationError) -> RequestError:
    """A body that does not have the declared form: the deepest field that is wrong, and what it must be."""
    faults = [(_path(fault["loc"], error.body, fault["type"] == "missing"), fault) for fault in error.errors()]
    deepest = max(faults, key=lambda found: len(found[0]))[0]
    reasons = dict.fromkeys(_reason(fault) for path, fault in faults if path == deepest)
    name = ".".join(map(str, deepest))
    if not name and faults[0][1]["type"] not in ("json_invalid", "too_many_keys"):
        return RequestError(400, "the body is not a JSON object; send one with `Content-Type: application/json`")
    return RequestError(400, f"{f'`{name}`' if name else 'the body'} {' or '.join(reasons)}", name or None)


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


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "is not a field that this server knows; leave it out"
    if fault["type"] == "json_invalid":
        return "is not JSON"
    if fault["type"] == "missing":
        return "is missing"
    if fault["type"] == "union_tag_not_found":
        return "needs a `type`"
    message = str(fault["msg"])
    return re.sub(r"^(Input|Value|String|List|Dictionary) should ", "should ", message)


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` a response in OpenAI's form."""

    async def refused(_: Request, error: Exception) -> Response:
        return error_response(refusal(error))

    async def not_valid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid(error))

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(RequestError(error.status_code, str(error.detail)), error.headers)

    app.add_exception_handler(Exception, refused)
    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(Pos2DError, refused)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, of_http)
