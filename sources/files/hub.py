"""Errors of downloads from the Hub, as one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager

from pos2d.errors import InputError


@contextmanager
def hub_errors(name: str, revision: str | None, alternatives: str) -> Iterator[None]:
    """Turn what a download raises inside the block into an error that names what was wanted.

    ``name`` says what and which, such as ``base model ORG/NAME``; ``alternatives`` what it could have been, as in
    ``a directory nor a model``.

    Raises:
        InputError: the repository or its revision cannot be downloaded.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        yield
    except RevisionNotFoundError:
        raise InputError(f"{name} has no revision {revision!r}; give a commit, tag or branch") from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        wanted = name if revision is None else f"{name} at revision {revision!r}"
        raise InputError(f"{wanted} is neither {alternatives} that can be downloaded from the Hub: {reason}") from None
