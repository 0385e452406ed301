"""What the OpenAPI document says of every route: its errors, and streams."""

from typing import Any

from pos2d.runtime.http.schemas.common import ErrorBody

ERRORS = {
    400: "A field is wrong or not supported; `param` is its name.",
    401: "The key is missing or wrong.",
    404: "The model or the request does not exist.",
    413: "The body is too large.",
    422: "The prompts, branches or limits are more than the server answers.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The request failed.",
    503: "The server is closing.",
}


def responses(*statuses: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The responses of a route besides its answer; ``streams``: it may be a stream of events."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": ERRORS[status]} for status in statuses or ERRORS
    }
    if streams:
        found[200] = {
            "description": "The answer, or with `stream` server-sent events.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    return found
