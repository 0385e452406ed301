"""Refusing a request: a status, one sentence, the field it is about, and when to try again."""

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pos2d.errors import Pos2DError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# Characters of a message or a field's name that are shown; both may repeat text of the request.
MAX_SHOWN = 1000
DEFECT = "the request failed; the server's log has its place"


class RefusedError(Pos2DError):
    """A request that is answered with ``status`` and this message alone.

    ``param`` is the request's field that is at fault, ``code`` a word for programs, and ``retry_after`` the seconds
    after which the same request may be accepted.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message[:MAX_SHOWN])
        self.status = status
        self.param = param[:MAX_SHOWN] if param else param
        self.code = code
        self.retry_after = retry_after

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer, in the form of OpenAI's errors."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


async def send_refusal(send: Send, refusal: RefusedError, *, close: bool = False) -> None:
    """Answer a request with a refusal; ``close`` ends the connection, where a part of the request was not read."""
    headers = {**refusal.headers, **({"connection": "close"} if close else {})}
    await send_json(send, refusal.status, refusal.content, headers)


async def send_json(send: Send, status: int, content: Any, headers: MutableMapping[str, str] | None = None) -> None:
    """Answer with a JSON value."""
    body = json.dumps(content).encode()  # in ASCII: a message may repeat text of the request that UTF-8 does not have
    await send_body(send, status, body, "application/json", headers)


async def send_body(
    send: Send, status: int, body: bytes, content_type: str, headers: MutableMapping[str, str] | None = None
) -> None:
    """Answer with ``body``."""
    named = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header, None where the request does not have it; of several, the first."""
    return next((value for key, value in scope["headers"] if key == name), None)
