"""Who may call the server: the names by which it is called, the pages that call it, and the keys of its users."""

import hashlib
import hmac
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from pos2d.runtime.http.refusals import App, Receive, RefusedError, Scope, Send, header, send_refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Routes that need no key.
OPEN = ("/health", "/")
PAGE_FILES = "/page/"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    return host in LOOPBACK or host.startswith("127.")


class HostNames:
    """Refuses requests that call the server by a name that is not its own, or that come from a page elsewhere.

    A page of any site may let its name point to 127.0.0.1 and then read what a server there answers (DNS rebinding);
    its requests still have its name in the Host header. Without that trick a page may send requests, although it cannot
    read the answers; these have another Origin.
    """

    def __init__(self, app: App, names: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        origin = header(scope, b"origin")
        if len(hosts) != 1 or host_name(f"//{hosts[0].decode('latin-1')}") not in self._names:
            refusal = RefusedError(
                421, "this server is not called by this Host; the server's `allowed_host` adds a name"
            )
            await send_refusal(send, refusal, close=True)
        elif origin is not None and not self._is_known(origin.decode("latin-1")):
            refusal = RefusedError(
                403, "pages of this Origin may not call this server; the server's `cors_origin` adds one"
            )
            await send_refusal(send, refusal, close=True)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins or host_name(origin) in self._names


def host_name(url: str) -> str | None:
    """The host of a URL in lower case, without its port; None where there is none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (reading it checks it)
        return parts.hostname if parts.username is None and not parts.path else None
    except ValueError:
        return None


class ApiKeys:
    """Refuses requests without one of the keys as their bearer token, for every path but those in ``OPEN``.

    The files of the page are open as well: a browser asks for them before the page can ask for a key, and they say
    nothing of the model.
    """

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in OPEN or path.startswith(PAGE_FILES) or self._is_known(header(scope, b"authorization") or b""):
            await self._app(scope, receive, send)
        else:
            await send_refusal(send, RefusedError(401, "give a key of this server as the bearer token"), close=True)

    def _is_known(self, authorization: bytes) -> bool:
        """Compare with every key, in a time that depends neither on the key nor on which one it is."""
        scheme, _, token = authorization.partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == b"bearer"
