"""Finds the adapter that a path or Hub id means, and says what else is there if it is none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pos2d.errors import InputError
from pos2d.git_lfs import refuse_pointer
from pos2d.sources.adapters.adapter import first_names
from pos2d.sources.adapters.foreign_files import describe_foreign, is_training_state
from pos2d.sources.adapters.mlx import MLX_CHECKPOINTS, MLX_WEIGHTS, is_mlx
from pos2d.sources.adapters.peft_files import (
    ADAPTER_CONFIG,
    INDEXES,
    PARTS,
    PICKLED_WEIGHTS,
    SAFE_WEIGHTS,
    cure_without_weights,
)
from pos2d.sources.files.hub import hub_errors
from pos2d.sources.files.links import refuse_broken_link
from pos2d.sources.sidecars.sidecars import TOKENIZER_FILES

Form = Literal["trainer", "peft", "mlx"]
# A name with one of these endings is a path, and never an id on the Hub.
FILE_ENDINGS = (".pth", ".pt", ".bin", ".safetensors", ".json", ".gguf", ".npz", ".ckpt")
WEIGHTS = (SAFE_WEIGHTS, PICKLED_WEIGHTS, MLX_WEIGHTS)
HUB_FILES = [ADAPTER_CONFIG, *INDEXES, SAFE_WEIGHTS, PARTS, MLX_WEIGHTS, "generation_config.json", *TOKENIZER_FILES]
FOREIGN = ("*.safetensors", "*.gguf", "*.npz")
WANTED = "give the trainer's .pth file or a PEFT directory"


@dataclass(frozen=True, slots=True)
class Location:
    """Where an adapter is: the trainer's file, or the directory of another form; ``label`` names it in a manifest."""

    path: Path
    form: Form
    label: str


def locate(adapter: str | Path) -> Location:
    """Find an adapter at a path, or download it if it is the id of one on the Hub, as ``org/name@revision``.

    Raises:
        InputError: there is none; the message says what is there, and what to give.
    """
    path = Path(adapter)
    if path.exists():
        path = path.absolute()
        return _locate_in(path, path.name) if path.is_dir() else _locate_file(path)
    hub_id, _, revision = str(adapter).partition("@")
    if not is_hub_id(hub_id):
        raise InputError(f"{path.absolute()} does not exist; {WANTED}")
    directory = _download(hub_id, revision or None)
    return _locate_in(directory, f"{hub_id}@{directory.name}")


def is_hub_id(text: str) -> bool:
    """Whether a text that is no path here can be the id of a repository on the Hub."""
    return text.count("/") == 1 and text[0] not in "./~" and text[-1] != "/" and not text.endswith(FILE_ENDINGS)


def _locate_file(path: Path) -> Location:
    directory = path.parent
    of_directory = path.name in (*WEIGHTS, *INDEXES, ADAPTER_CONFIG) or path.match(PARTS)
    if of_directory and (directory / ADAPTER_CONFIG).is_file():
        return _locate_in(directory, directory.name)
    refuse_pointer(path)
    if of_directory:
        raise InputError(_without_config(directory, path.name))
    if path.match(MLX_CHECKPOINTS) and (directory / ADAPTER_CONFIG).is_file() and is_mlx(directory):
        raise InputError(
            f"{path} was saved during a training of MLX; copy it, as {MLX_WEIGHTS}, and {ADAPTER_CONFIG} to a new "
            "directory, and give that"
        )
    foreign = describe_foreign(path)
    if foreign is not None:
        raise InputError(f"{path} {foreign}")
    return Location(path, "trainer", path.name)


def _locate_in(directory: Path, label: str) -> Location:
    refuse_broken_link(directory / ADAPTER_CONFIG)
    if (directory / ADAPTER_CONFIG).is_file():
        return Location(directory, "mlx" if is_mlx(directory) else "peft", label)
    weights = [path.name for name in (*WEIGHTS, PARTS) for path in directory.glob(name)]
    if weights:
        raise InputError(_without_config(directory, weights[0]))
    if (directory / "config.json").is_file():
        raise InputError(f"{directory} is a model, not an adapter; {_inner(directory) or WANTED}")
    found = sorted(directory.glob("*.pth"))
    files = [path for path in found if not is_training_state(path)]
    if len(files) == 1:
        return Location(files[0], "trainer", files[0].name if label == directory.name else label)
    inner = _inner(directory)
    if inner:
        raise InputError(f"{directory} has no adapter itself; {inner}")
    raise InputError(f"{directory} has {len(files)} .pth files and no {ADAPTER_CONFIG}; {_cure(directory)}")


def _without_config(directory: Path, weights: str) -> str:
    return (
        f"{directory} has {weights} but no {ADAPTER_CONFIG}, without which scale and modules are not known; copy "
        f"{ADAPTER_CONFIG} there from the directory in which it was saved"
    )


def _inner(directory: Path) -> str:
    """The cure where a folder inside has an adapter; empty where none has one."""
    inner = [path.parent.name for path in directory.glob(f"*/{ADAPTER_CONFIG}")]
    if not inner:
        return ""
    inner.sort(key=_by_number)
    names = first_names(inner[::-1])
    return f"an adapter is in the folder {names}; give that folder, such as {directory / inner[-1]}"


def _by_number(name: str) -> tuple[int, str]:
    """Checkpoints in the order of their steps."""
    digits = name.rpartition("-")[2]
    return (int(digits) if digits.isdecimal() else -1), name


def _cure(directory: Path) -> str:
    states = sorted(path.name for path in directory.iterdir() if is_training_state(path))
    shards = cure_without_weights(directory)
    if shards != "save the adapter again":
        return shards
    if states:
        return (
            f"{first_names(states)} are states of a training, not an adapter; give the directory in which the adapter "
            "was saved"
        )
    foreign = [path for ending in FOREIGN for path in sorted(directory.glob(ending))]
    description = describe_foreign(foreign[0]) if foreign else None
    return f"{foreign[0].name} {description}" if description else "give one adapter"


def _download(hub_id: str, revision: str | None) -> Path:
    """The snapshot of the adapter's files alone."""
    from huggingface_hub import snapshot_download

    with hub_errors(f"adapter {hub_id}", revision, "a path here nor an adapter"):
        path = Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
        if not any(path.glob("*.safetensors")):
            rest = [PICKLED_WEIGHTS] if (path / ADAPTER_CONFIG).is_file() else ["*.pth"]
            path = Path(snapshot_download(hub_id, revision=path.name, allow_patterns=rest, ignore_patterns=["*/*"]))
    return path
