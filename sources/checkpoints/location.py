"""Finds the directory of a base model: a local one, or one that is downloaded from the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from pos2d.errors import InputError, UnsafeInputError, UsageError
from pos2d.manifest import CARD, FILE_NAME, Kind, is_artifact
from pos2d.sources.checkpoints.checkpoint import read_config
from pos2d.sources.checkpoints.minimind import ITS_VOCABULARY, describe_minimind, has_its_vocabulary
from pos2d.sources.checkpoints.weight_files import (
    CONFIG,
    INDEX,
    INDEX_ENDING,
    OLD_INDEX,
    OLD_SINGLE,
    SINGLE,
    explicit_file,
    files_of_index,
)
from pos2d.sources.files.hub import hub_errors
from pos2d.sources.files.json_object import read_json_object
from pos2d.sources.files.links import refuse_broken_link
from pos2d.sources.files.pth import load_pth

# Everything but weights. Subfolders hold the same model in other forms, but for the tokenizer's further templates.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", CARD]
TEMPLATES = "additional_chat_templates/*.jinja"
PICKLES = (".pth", ".pt", ".bin")
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".json")


def split_revision(model: str) -> tuple[str, str | None]:
    """Split ``ORG/NAME@REVISION`` into an id of the Hub and its revision; what is a path is taken literally."""
    name, _, revision = model.partition("@")
    if Path(model).exists() or _looks_like_path(model):
        return model, None
    return name, revision or None


def locate(base_model: str, revision: str | None) -> tuple[Path, str | None]:
    """The local directory of a base, and its commit if it came from the Hub.

    It came from there at ``revision``, or at the one that ``base_model`` names, as ``ORG/NAME@REVISION``.

    Raises:
        UsageError: an empty name, a revision of a local directory, or two.
        InputError: neither a directory with a model nor a model of the Hub, but perhaps another artifact there.
        UnsafeInputError: an index that names files outside its directory.
    """
    if not base_model:
        raise UsageError("the name of the model is empty; give a directory or a Hub id")
    base_model, named = split_revision(base_model)
    if named is not None and revision is not None:
        raise UsageError(f"{base_model}@{named} names a revision, and so does `revision`; give one of them")
    revision = revision or named
    path = Path(base_model)
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"`revision` is for a Hub id; {base_model} is a directory")
        refuse_broken_link(path / CONFIG)
        if not (path / CONFIG).is_file():
            raise InputError(f"{path / CONFIG} does not exist; {_cure(path)}")
        return path, None
    if path.suffix == ".gguf":
        raise InputError(f"{base_model} is a GGUF file; {GGUF_CURE}")
    if path.is_file() and path.name.endswith(WEIGHT_ENDINGS):
        _refuse_minimind(path)
        cure = f"its directory, {path.parent}" if (path.parent / CONFIG).is_file() else "a Hugging Face model directory"
        if path.suffix == ".pth":
            cure += ", or give it as `lora` if it is an adapter, and its base as `base_model`"
        raise InputError(f"{base_model} is a file of weights; give {cure}")
    if _looks_like_path(base_model) or path.exists():
        raise InputError(
            f"{base_model} {'is not a directory' if path.exists() else 'does not exist'}; give a Hugging Face model "
            "directory or a Hub id"
        )
    return _download(base_model, revision)


def _looks_like_path(model: str) -> bool:
    """Whether a text that is no path here cannot be meant as an id of the Hub."""
    # A name in a directory that exists here is a misspelt path, and no organisation of the Hub. A revision may have any
    # letters, but where a path stands before the @, a directory with all of that name was meant.
    name, mark, _ = model.partition("@")
    path = Path(name)
    in_directory = path.parent != Path() and path.parent.is_dir()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or in_directory or (bool(mark) and path.exists())


def _refuse_minimind(path: Path) -> None:
    """Raise InputError if a file of ``torch.save`` is a model of ParallelMind's own architecture."""
    if path.suffix not in PICKLES:
        return
    try:
        content = load_pth(path)
    except (InputError, UnsafeInputError):
        return
    if not isinstance(content, Mapping):
        return
    own = describe_minimind(content) or (ITS_VOCABULARY if has_its_vocabulary(content) else None)
    if own is not None:
        raise InputError(f"base model {path} {own}")


GGUF_CURE = "give the Hugging Face model directory from which it was converted"


def _cure(directory: Path) -> str:
    """What to give in place of a directory without a configuration."""
    inner = sorted(path.parent for path in directory.glob("*/config.json"))
    snapshots = sorted(path.parent for path in directory.glob("snapshots/*/config.json"))
    if (directory / "adapter_config.json").is_file():
        return "the directory holds an adapter; give it as `lora`, and the model that it was trained on as `base_model`"
    if is_artifact(directory):
        return "the directory holds an artifact without a model for transformers; give the base that it was made from"
    if inner or snapshots:
        found = (inner or snapshots)[:3]
        return f"a model is in {' and in '.join(map(str, found))}; give that directory"
    if any(directory.glob("*.gguf")):
        return f"the directory holds a GGUF file; {GGUF_CURE}"
    if (directory / "params.json").is_file():
        return "params.json is of its authors' own format; convert the model to Hugging Face's format, or download that"
    for path in sorted(directory.glob("*.pth")):
        _refuse_minimind(path)
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return "copy it from the repository of the model"
    return "give a Hugging Face model directory"


def _download(base_model: str, revision: str | None) -> tuple[Path, str]:
    """The snapshot of a repository on the Hub; all its files are of one commit."""
    with hub_errors(f"model {base_model}", revision, "a directory here nor a model"):
        path = _fetch(base_model, revision, SMALL_FILES, ignore=["*/*"])
        _refuse_artifact(base_model, path)
        _fetch(base_model, path.name, [TEMPLATES])
        _fetch_weights(base_model, path)
    return path, path.name


def _refuse_artifact(base_model: str, path: Path) -> None:
    """Raise InputError if a repository holds an artifact that is no plain model as well."""
    if not is_artifact(path):
        return
    block = read_json_object(path / FILE_NAME, "copy the artifact again")
    kind = block.get("kind")
    if kind in get_args(Kind) and (kind != "stock" or block.get("quant")):
        raise InputError(
            f"{base_model} is an artifact of this tool (kind {kind}), which runs from a directory: download it with "
            "`hf download` and --local-dir, and give that directory; an adapter needs the base it was trained on"
        )


def _fetch_weights(base_model: str, path: Path) -> None:
    """Download the weights that transformers would load, and no others: those that the configuration names, or else the
    first of these that the repository has."""
    explicit = explicit_file(path, read_config(path))
    if explicit is not None:
        _fetch(base_model, path.name, [explicit])
        if explicit.endswith(INDEX_ENDING) and (path / explicit).is_file():
            _fetch(base_model, path.name, files_of_index(path / explicit))
        return
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        _fetch(base_model, path.name, [single])
        if (path / single).is_file():
            return
        if (path / index).is_file():
            _fetch(base_model, path.name, files_of_index(path / index))
            return


def _fetch(base_model: str, revision: str | None, patterns: list[str], ignore: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base_model, revision=revision, allow_patterns=patterns, ignore_patterns=ignore))
