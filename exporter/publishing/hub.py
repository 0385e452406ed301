"""Sends an artifact to the Hugging Face Hub in one commit: all of its files are there, or none."""

import json
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pos2d import __version__
from pos2d.errors import HubError, OutputError
from pos2d.exporter.publishing.contents import Contents
from pos2d.exporter.publishing.hub_errors import hub_errors
from pos2d.manifest import FILE_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

# Weights and graphs, which a program may load in place of those of the artifact.
LOADED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".onnx")
NO_TOKEN = "there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN to a token with write access"


@dataclass(frozen=True, slots=True)
class Target:
    """Where an artifact is sent: a repository ``ORG/NAME`` and a branch of it.

    ``private``: the repository has to be private. ``create``: it may be created, and so may the branch.
    """

    repo: str
    branch: str
    private: bool
    create: bool


@dataclass(frozen=True, slots=True)
class Published:
    """The commit and its address; ``changed``: there was something to commit. ``created``: the repository is new.

    ``deleted``: files of the artifact that was there before, which this one does not have.
    """

    commit: str
    url: str
    changed: bool
    created: bool
    private: bool
    deleted: tuple[str, ...]
    warnings: tuple[str, ...]


def check_token() -> None:
    """Check that there is a token.

    Raises:
        HubError: there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(NO_TOKEN)


def publish(contents: Contents, target: Target, message: str) -> Published:
    """Send ``contents`` to ``target``.

    Large files are uploaded first and are not visible until the commit; what was uploaded is not sent again when an
    interrupted call is repeated. Files of an artifact that was there before are deleted in the same commit.

    Raises:
        HubError: the Hub cannot be reached or refuses, or a repository that may not be created does not exist.
        OutputError: the repository is public though ``private`` is set, or has weights of another model.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="pos2d", library_version=__version__)
    with hub_errors(target.repo, api.endpoint), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        info, created = _repository(api, target)
        names = {file.name for file in contents.files}
        deleted = _left_from_before(api, target, info, names)
        additions = [
            CommitOperationAdd(file.name, contents.changed.get(file.name, contents.directory / file.name))
            for file in contents.files
        ]
        # In place of the .gitignore in the repository, which would leave out files in silence.
        api.preupload_lfs_files(target.repo, additions, revision=target.branch, gitignore_content="# none\n")
        commit = api.create_commit(
            target.repo,
            [*additions, *(CommitOperationDelete(name) for name in deleted)],
            commit_message=message,
            revision=target.branch,
            parent_commit=info.sha,
        )
    return Published(
        commit=commit.oid,
        url=f"{api.endpoint}/{target.repo}/tree/{commit.oid}",
        changed=commit.oid != info.sha,
        created=created,
        private=bool(info.private),
        deleted=deleted,
        warnings=tuple(
            " ".join(str(warning.message).split()) for warning in caught if issubclass(warning.category, UserWarning)
        ),
    )


def _repository(api: "HfApi", target: Target) -> "tuple[ModelInfo, bool]":
    """What the Hub has at ``target``, which is created where that is allowed; and whether the repository is new.

    Raises:
        HubError: it does not exist and may not be created.
        OutputError: it is public, and has to be private.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    missing = "leave out `no_create` to create it"
    created = False
    try:
        info = api.model_info(target.repo)
    except RepositoryNotFoundError:
        if not target.create:
            raise HubError(f"{target.repo} does not exist on the Hub, or the token may not see it; {missing}") from None
        api.create_repo(target.repo, private=target.private or None)
        created = True
        info = api.model_info(target.repo)
    if target.private and not info.private:
        raise OutputError(
            f"{target.repo} exists on the Hub and is public; make it private in its settings, or leave out `private`"
        )
    try:
        return api.model_info(target.repo, revision=target.branch), created
    except RevisionNotFoundError:
        if not target.create:
            raise HubError(f"{target.repo} has no branch {target.branch!r}; {missing}") from None
    api.create_branch(target.repo, branch=target.branch, exist_ok=True)
    return api.model_info(target.repo, revision=target.branch), created


def _left_from_before(api: "HfApi", target: Target, info: "ModelInfo", names: Collection[str]) -> tuple[str, ...]:
    """The files in the repository that belong to the artifact that is there, and not to the new one.

    Raises:
        OutputError: there are other files that a program may load in place of the artifact's.
    """
    others = sorted({file.rfilename for file in info.siblings or ()} - set(names))
    former = _files_of_manifest(api, target, info) if others and _has(info, FILE_NAME) else set[str]()
    foreign = [name for name in others if name not in former and name.endswith(LOADED)]
    if foreign:
        raise OutputError(
            f"{target.repo} holds {foreign[0]}, which is not part of this artifact and may be loaded in place of it; "
            "delete it there, or give another repository or `revision`"
        )
    return tuple(name for name in others if name in former)


def _has(info: "ModelInfo", name: str) -> bool:
    return any(file.rfilename == name for file in info.siblings or ())


def _files_of_manifest(api: "HfApi", target: Target, info: "ModelInfo") -> set[str]:
    """The names in the manifest that the repository has; none if that is not one of ours."""
    with TemporaryDirectory() as place:
        path = api.hf_hub_download(target.repo, FILE_NAME, revision=info.sha, cache_dir=place)
        try:
            block: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            return set()
    is_ours = isinstance(block, dict) and {"format_version", "kind", "files"} <= set(block)
    return set(_texts(block["files"])) if is_ours else set()


def _texts(files: Any) -> Iterator[str]:
    yield from (name for name in files if isinstance(name, str)) if isinstance(files, dict) else ()
