"""Options of the server: where it listens, who may use it, and the limits of a request."""

import re
from dataclasses import dataclass

from pos2d.errors import UsageError
from pos2d.options import check_options, option
from pos2d.units import parse_size

KEY_VARIABLE = "POS2D_API_KEY"
ORIGIN = re.compile(r"\*|https?://[^/\s]+")
LISTENING, LIMITS, TIMES = "Server", "Limits of a request", "Time limits"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How the server listens, and what it accepts. Times are in seconds.

    Raises:
        UsageError: a value of another type or out of range.
    """

    host: str = option(
        "127.0.0.1", "Address to listen on; 0.0.0.0 is every address of this machine.", section=LISTENING
    )
    port: int = option(8000, "Port to listen on; 0 takes a free one.", minimum=0, maximum=65535, section=LISTENING)
    api_key: tuple[str, ...] = option(
        (),
        f"Key that a request must have as its bearer token. Repeat the option for several keys. The variable "
        f"{KEY_VARIABLE} takes one key a line, and keeps them out of the list of processes.",
        metavar="KEY",
        default_text=KEY_VARIABLE,
        section=LISTENING,
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "Further host name by which clients may call the server. On a loopback address, only localhost, 127.0.0.1 "
        "and [::1] are accepted without it. Repeat the option for several.",
        metavar="NAME",
        section=LISTENING,
    )
    cors_origin: tuple[str, ...] = option(
        (),
        "Origin whose pages may call the server from a browser, such as https://example.com, or * for all. Repeat the "
        "option for several.",
        metavar="ORIGIN",
        section=LISTENING,
    )
    max_connections: int = option(
        256, "Number of connections that may be open at once.", minimum=1, maximum=100_000, section=LISTENING
    )
    access_log: bool = option(
        False, "Log method, path, status and time of every request on standard error.", section=LISTENING
    )
    max_waiting: int = option(
        16, "Number of requests that may wait; further ones are refused with 429.", minimum=0, section=LIMITS
    )
    kv_cache_memory: str | None = option(
        None,
        "Memory for the keys and values of all running requests, such as 2GB.",
        metavar="SIZE",
        default_text="half of the free memory, at most one context for each running branch",
        section=LIMITS,
    )
    max_running_branches: int = option(
        16,
        "Number of branches of all requests that are written at once; further requests wait.",
        minimum=1,
        maximum=1024,
        section=LIMITS,
    )
    max_body: str = option("1MiB", "Size of the body of a request.", metavar="SIZE", section=LIMITS)
    max_prompt_tokens: int | None = option(
        None,
        "Number of tokens of a request's context and prompts.",
        minimum=1,
        default_text="the context of the model",
        section=LIMITS,
    )
    max_request_branches: int = option(
        16, "Number of branches, or answers, of a request.", minimum=1, maximum=1024, section=LIMITS
    )
    max_request_tokens: int | None = option(
        None,
        "Number of new tokens of all branches of a request.",
        minimum=1,
        default_text="the context of the model",
        section=LIMITS,
    )
    max_stop: int = option(4, "Number of stop texts of a request.", minimum=0, maximum=1024, section=LIMITS)
    max_schema_bytes: int = option(65536, "Size of a JSON schema that answers must have.", minimum=2, section=LIMITS)
    request_timeout: float = option(
        600.0,
        "Time for one request. An answer that takes longer ends there, and a request that has not begun is refused.",
        minimum=1,
        maximum=86400,
        section=TIMES,
    )
    template_timeout: float = option(
        2.0,
        "CPU time in which the chat template must render a request.",
        minimum=0.1,
        maximum=60,
        section=TIMES,
    )
    header_timeout: float = option(
        10.0, "Time in which the head of a request must arrive.", minimum=0.1, maximum=600, section=TIMES
    )
    body_timeout: float = option(
        30.0, "Time in which the body of a request must arrive.", minimum=0.1, maximum=3600, section=TIMES
    )
    write_timeout: float = option(
        30.0,
        "Time for which a client may leave an answer unread before its request is cancelled.",
        minimum=0.1,
        maximum=3600,
        section=TIMES,
    )
    grace: float = option(
        30.0,
        "Time that running requests have after the server was asked to end.",
        minimum=0,
        maximum=3600,
        section=TIMES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        parse_size(self.max_body, "max_body")
        if self.kv_cache_memory is not None:
            parse_size(self.kv_cache_memory, "kv_cache_memory")
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise UsageError("an `api_key` must be printable ASCII characters without spaces")
        for origin in self.cors_origin:
            if not ORIGIN.fullmatch(origin):
                raise UsageError(f"`cors_origin` {origin!r} must be an origin, such as https://example.com, or *")

    @property
    def max_body_bytes(self) -> int:
        return parse_size(self.max_body, "max_body")
