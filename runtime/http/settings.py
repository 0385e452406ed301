"""What the routes are told when the server starts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """``model`` is the name by which requests call the model; ``created`` is shown with it, a time in seconds.

    ``context`` is the system message of conversations that have none.
    """

    model: str
    context: str | None = None
    created: int = 0
