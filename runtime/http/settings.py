"""What the routes are told when the server starts."""

from dataclasses import dataclass

from pos2d.runtime.http.limits import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """``model`` is the name by which requests call the model, and ``created`` a time in seconds that is shown with it.

    A request of completions may have ``max_prompts`` prompts; ``limits`` hold for each of them.
    """

    model: str
    limits: Limits
    created: int = 0
    max_prompts: int = 64
