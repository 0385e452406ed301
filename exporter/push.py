"""Publish an artifact on the Hugging Face Hub, in one commit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import UsageError
from pos2d.exporter.publishing.contents import PublishedFile, contents_of
from pos2d.exporter.publishing.hub import Published, Target, check_token, publish
from pos2d.file_checks import check_files
from pos2d.manifest import Manifest, read_manifest
from pos2d.options import check_options, option, read_options, takes_options
from pos2d.units import size_text

MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Where an artifact is published, and with what message.

    Raises:
        UsageError: a value of another type, or an empty one.
    """

    revision: str = option(
        MAIN, "Branch to commit to; it is created if it does not exist.", metavar="BRANCH", flags=("--branch",)
    )
    message: str | None = option(
        None,
        "Message of the commit.",
        metavar="TEXT",
        default_text="what the artifact is",
        flags=("--commit-message",),
    )
    private: bool = option(False, "Create the repository as a private one; one that exists and is public is refused.")
    no_create: bool = option(False, "Refuse a repository or a branch that does not exist, in place of creating it.")
    dry_run: bool = option(False, "Show what would be sent, and ask the Hub nothing.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("revision", "message"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise UsageError(f"`{name}` is empty; give a text, or leave it out")


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was sent to the branch ``revision`` of ``repo``, or with ``dry_run`` would be.

    ``bytes`` is the size of ``files``, of which the Hub asks only for those that it does not have. ``unlisted``: files
    that are not sent, because they are not part of the artifact. ``paths``: by file, keys whose path of this machine is
    sent as its last name. ``published``: the commit, and what the Hub had before; None after a dry run, which asks the
    Hub nothing.
    """

    artifact: str
    endpoint: str
    repo: str
    revision: str
    message: str
    private: bool
    dry_run: bool
    files: tuple[PublishedFile, ...]
    bytes: int
    unlisted: tuple[str, ...]
    paths: Mapping[str, tuple[str, ...]]
    published: Published | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each thing that is not sent as it is."""
        return (*self._left_out(), *(self.published.warnings if self.published is not None else ()))

    def _left_out(self) -> list[str]:
        sentences = [
            f"{file} names a path of this machine ({', '.join(keys)}), of which only the last name is sent"
            for file, keys in self.paths.items()
        ]
        if self.unlisted:
            more = f" and {len(self.unlisted) - 3} more" if len(self.unlisted) > 3 else ""
            sentences.append(
                f"{', '.join(self.unlisted[:3])}{more} {'is' if len(self.unlisted) == 1 else 'are'} not part of the "
                "artifact, and not sent"
            )
        return sentences

    def summary(self) -> str:
        """One line for people."""
        size = f"{len(self.files)} files, {size_text(self.bytes)}"
        place = f"{self.endpoint}/{self.repo}, branch {self.revision}"
        if self.published is None:
            private = ", private" if self.private else ""
            return f"{place}{private}: {size} would be sent; the Hub was not asked whether it exists"
        if not self.published.changed:
            return f"{place}: has these {size} already, nothing was committed"
        visible = "private" if self.published.private else "public"
        deleted = f", {len(self.published.deleted)} of the former artifact deleted" if self.published.deleted else ""
        return f"{self.published.url}: {size}{deleted}, in one commit to {self.revision} ({visible})"


@takes_options(PushOptions)
def push(artifact: str | Path, repo: str, **options: Any) -> PushReport:
    """Publish ``artifact``, a directory that merge or export wrote, as ``repo`` on the Hub: ``ORG/NAME``.

    Every file is compared with its hash first, so that no damaged artifact is published. The files that the manifest
    lists are sent, with the manifest and the card, in one commit. The same call continues an interrupted upload.

    Raises:
        UsageError: a name that no repository can have, or options out of range.
        InputError: no artifact, a file that changed, or one that holds a token of the Hub.
        HubError: there is no token, or the Hub cannot be reached or refuses.
        OutputError: the repository is public though ``private`` is set, or has weights of another model.
    """
    (chosen,) = read_options(options, PushOptions)
    _check_name(repo)
    directory = Path(artifact)
    manifest = read_manifest(directory)
    if not chosen.dry_run:
        check_token()
    check_files(directory, manifest)
    contents = contents_of(directory, manifest)
    message = chosen.message or _message(manifest)
    target = Target(repo, chosen.revision, chosen.private, not chosen.no_create)
    return PushReport(
        artifact=str(directory),
        endpoint=_endpoint(),
        repo=repo,
        revision=chosen.revision,
        message=message,
        private=chosen.private,
        dry_run=chosen.dry_run,
        files=contents.files,
        bytes=sum(file.bytes for file in contents.files),
        unlisted=contents.unlisted,
        paths=contents.paths,
        published=None if chosen.dry_run else publish(contents, target, message),
    )


def _check_name(repo: str) -> None:
    """Check that ``repo`` is a name that a repository can have.

    Raises:
        UsageError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        is_valid = repo.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UsageError(
            f"{repo!r} is no name of a repository on the Hub; give ORG/NAME, such as someone/my-model, in letters, "
            "digits, dots, dashes and underscores"
        )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _message(manifest: Manifest) -> str:
    form = manifest.kind if manifest.recipe is None else f"{manifest.kind} {manifest.recipe.name}"
    return f"{manifest.made_from} ({form}), written by pos2d {manifest.tool_version}"
