"""What the Hub answers to an upload that it refuses, as one sentence with the cure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pos2d.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

AGAIN = "the same command continues, and does not send again what was uploaded"
# By the status of the answer; {repo} is the repository.
CURES = {
    400: "correct what it names",
    401: "log in with `hf auth login`, or set HF_TOKEN to a token with write access",
    402: "free some space there, or change the plan of the account",
    403: "take a token that may write to {repo}, or another repository",
    404: "check the name, and that the token may see it",
    409: "run the same command again",
    412: "another commit was made meanwhile; run the same command again",
    413: "free some space there, or change the plan of the account",
    429: "wait a few minutes, and run the same command again",
}
SPACE = ("storage", "quota", "limit")


@contextmanager
def hub_errors(repo: str, endpoint: str) -> Iterator[None]:
    """Turn what an upload to ``repo`` raises inside the block into one sentence.

    Raises:
        HubError: the Hub cannot be reached, or refuses. Errors of local files stay as they are.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The base of all errors of the client's HTTP library, which differs between its releases.
    of_http: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (of_http, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            reason = " ".join(str(error).split())
            raise HubError(f"the Hub does not accept the upload to {repo}: {reason}; correct what it names") from None
        refused = _refusal(error)
        if refused is not None:
            raise HubError(_refused(refused, repo)) from None
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.filename is not None:
            raise cause from None
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, OfflineModeIsEnabled):
            raise HubError("HF_HUB_OFFLINE is set, which forbids the network; unset it to publish") from None
        raise HubError(f"the connection to the Hub at {endpoint} failed: {reason}; {AGAIN}") from None


def _refusal(error: BaseException) -> "HfHubHTTPError | None":
    """The answer of the Hub behind an error: itself, or what caused it."""
    from huggingface_hub.errors import HfHubHTTPError

    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, HfHubHTTPError):
        seen = seen.__cause__
    return seen


def _refused(error: "HfHubHTTPError", repo: str) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split()).rstrip(".")
    reason = f"{status} {said}".strip()
    if status >= 500:
        return f"the Hub failed at the upload to {repo} ({reason}); {AGAIN}"
    cure = CURES.get(status, "see its answer").format(repo=repo)
    if status == 403 and any(word in said.lower() for word in SPACE):
        cure = CURES[413]
    return f"the Hub refuses the upload to {repo} ({reason}); {cure}"
