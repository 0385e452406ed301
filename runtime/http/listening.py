"""The socket on which the server listens."""

import errno
import socket
import sys

from pos2d.errors import OutputError, UsageError


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, on which nobody listens yet; port 0 is a free one.

    Raises:
        OutputError: the port is in use.
        UsageError: this machine does not have the address, or this user may not have the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"`host` {host!r} is no address of this machine: {_reason(error)}") from None
    try:
        if sys.platform != "win32":  # there, two servers could then share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _refusal(error, host, port) from None
    return bound


def listen(bound: socket.socket, backlog: int) -> None:
    """Listen on a bound socket.

    Raises:
        OutputError: another program has begun to listen there since.
    """
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(backlog)
    except OSError as error:
        raise _refusal(error, host, port) from None


def url_of(bound: socket.socket) -> str:
    """The address of a server, as a browser on the same machine takes it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(error: OSError, host: str, port: int) -> Exception:
    if error.errno == errno.EADDRINUSE:
        return OutputError(f"`port` {port} of {host} is in use; end the program that listens there, or give another")
    if error.errno == errno.EACCES:
        return UsageError(f"`port` {port} is reserved for the administrator; give one from 1024 on")
    return UsageError(f"`host` {host!r} is no address of this machine: {_reason(error)}")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).replace("`", "'")
