"""What the routes are told when the server starts."""

from dataclasses import dataclass

from pos2d.runtime.text.options import MAX_BRANCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """``model`` is the name by which requests call the model, and ``created`` a time in seconds that is shown with it.

    The others are limits of a request: branches or answers of one prompt, prompts, and bytes of a JSON schema.
    """

    model: str
    created: int = 0
    max_branches: int = MAX_BRANCHES
    max_prompts: int = 64
    max_schema_bytes: int = 65536
