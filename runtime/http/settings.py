"""What the routes are told when the server starts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """``model`` is the name by which requests call the model; ``created`` is shown with it, a time in seconds."""

    model: str
    created: int = 0
