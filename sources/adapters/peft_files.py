"""The files of PEFT directories: weights in one file or several, under the names of every release of PEFT."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.git_lfs import refuse_pointer
from pos2d.hashing import sha256
from pos2d.sources.adapters.adapter import first_names, refuse_empty
from pos2d.sources.checkpoints.weight_files import files_of_index
from pos2d.sources.files.links import refuse_broken_link
from pos2d.sources.files.pth import read_pth

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

ADAPTER_CONFIG = "adapter_config.json"
SAFE_WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
# transformers gives the index of an adapter in several files the name of a model's.
INDEXES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
PARTS = "adapter_model-*-of-*.safetensors"
PREFIXES = ("base_model.model.", "module.", "_orig_mod.")
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of one adapter's weights, in order; ``name`` is the file that messages name."""

    files: tuple[Path, ...]

    @property
    def name(self) -> Path:
        return self.files[0]

    @property
    def sha256(self) -> str:
        """Of the file, or of the hashes of several files."""
        digests = [sha256(file) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def weight_files(directory: Path) -> WeightFiles:
    """Find the weights of a PEFT directory: one file, or those that an index names.

    Raises:
        InputError: no weights, an incomplete set of files, both forms at once, or a link to a file that is missing.
        UnsafeInputError: an index that names files outside the directory.
    """
    refuse_broken_link(directory / SAFE_WEIGHTS)
    indexed = next((directory / name for name in INDEXES if (directory / name).is_file()), None)
    parts = sorted(directory.glob(PARTS))
    if (directory / SAFE_WEIGHTS).is_file():
        if parts:
            raise InputError(
                f"{directory} has {SAFE_WEIGHTS} and {parts[0].name}, two forms of the weights; delete the older one"
            )
        return WeightFiles((directory / SAFE_WEIGHTS,))
    if indexed is not None and (parts or indexed.name == INDEXES[0]):
        return WeightFiles(tuple(directory / name for name in _files_of_index(indexed)))
    if parts:
        raise InputError(
            f"{directory} has {parts[0].name}, but no {INDEXES[0]}; copy the index, or save again in one file"
        )
    refuse_broken_link(directory / PICKLED_WEIGHTS)
    if (directory / PICKLED_WEIGHTS).is_file():
        return WeightFiles((directory / PICKLED_WEIGHTS,))
    raise InputError(f"{directory} has no {SAFE_WEIGHTS} and no {PICKLED_WEIGHTS}; {cure_without_weights(directory)}")


def cure_without_weights(directory: Path) -> str:
    """What to do about a directory that has a configuration of PEFT but no weights, by the other files in it."""
    if any(directory.glob("pytorch_model_fsdp*")) or any(directory.glob("*.distcp")):
        return "the weights are shards of FSDP: merge them with `accelerate merge-weights`, or save the adapter again"
    if any(directory.glob("global_step*")) or (directory / "zero_to_fp32.py").is_file():
        return "the weights are shards of DeepSpeed: gather them with its zero_to_fp32.py, or save the adapter again"
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1 and (directory / ADAPTER_CONFIG).is_file():
        return f"rename {others[0]} to {SAFE_WEIGHTS} if it has the adapter's weights"
    return "save the adapter again"


def _files_of_index(index: Path) -> list[str]:
    files = files_of_index(index)
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise InputError(f"{index} names {first_names(missing)}, which is missing; copy the adapter again")
    return files


def read_tensors(weights: WeightFiles) -> "dict[str, torch.Tensor]":
    """All tensors by their plain names: without what wrappers add, and with the names of all PEFT releases unified.

    Raises:
        InputError: a file that cannot be read, a tensor that occurs twice, or one without values.
        UnsafeInputError: a pickle that would run code.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weights.files:
        refuse_pointer(file)
        content = read_pth(file) if file.name == PICKLED_WEIGHTS else _read_safetensors(file)
        refuse_empty({name: tensor.shape for name, tensor in content.items()}, file)
        for name, tensor in content.items():
            short = plain_name(name)
            if short in tensors:
                raise InputError(
                    f"{file}: tensor {name} occurs twice, under different prefixes; save the adapter again"
                )
            tensors[short] = tensor
    return tensors


def _read_safetensors(file: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError, safe_open

    try:
        reader: Any = safe_open(file, framework="pt")
        with reader as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}; save the adapter again") from None


def plain_name(name: str) -> str:
    """The name of a tensor without what PEFT, its releases and other wrappers of a model add to it."""
    while name.startswith(PREFIXES):
        name = next(name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix))
    name = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
    return name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name
