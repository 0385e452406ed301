"""The configuration and the tensors of an opened model: those of an artifact, or of a merge that is not written."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pos2d.errors import InputError
from pos2d.families import MODEL_TYPE_PREFIX
from pos2d.graph_metadata import differing_keys
from pos2d.manifest import FILE_NAME, Manifest
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.hf_config import baked_config
from pos2d.sources.tensors.in_memory import merged_tensors
from pos2d.sources.tensors.tensor_plan import plan_tensors
from pos2d.text_files import read_text


class TensorSource(Protocol):
    """Where weights are read from; ``files`` maps the name of a tensor to the file of ``directory`` that has it."""

    @property
    def directory(self) -> Path: ...

    @property
    def files(self) -> Mapping[str, str]: ...

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of a tensor on ``device``, in ``dtype`` or in its stored type."""


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of an artifact's files, each read on demand and not cached."""

    directory: Path
    files: Mapping[str, str]

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        # The file is memory-mapped: pages that were read count as this process's memory until it is closed.
        with safe_open(self.directory / self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor.to(device=device, dtype=dtype, copy=True)


@contextmanager
def opened_weights(
    opened: OpenedModel, dtype: str, *, quantised: bool
) -> Iterator[tuple[dict[str, Any], TensorSource]]:
    """The configuration of our classes and the tensors of a model, readable until the ``with`` block ends.

    ``dtype``: ``auto``, or the type that the weights are wanted in. ``quantised``: weights are quantised while they are
    loaded. A sum of base and adapters is rounded once, to that type, or quantised without being rounded before.

    Raises:
        InputError: a configuration or a file that cannot be read, or other positions than the manifest has.
    """
    source = opened.source
    if source is None:
        config = config_of_artifact(opened.directory, opened.manifest)
        yield config, stored_tensors(opened.directory, opened.manifest)
        return
    plan = plan_tensors(source.base, source.adapters, "float32" if quantised else dtype)
    with merged_tensors(source.base, plan) as tensors:
        yield baked_config(source.base, source.spec, opened.manifest.dtype, plan.tied), tensors


def config_of_artifact(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """The configuration of our classes for an artifact, whose own is of the base's classes if it has no 2D RoPE.

    Raises:
        InputError: a file that cannot be read, or other positions than those of the manifest.
    """
    path = directory / CONFIG
    try:
        config: dict[str, Any] = json.loads(read_text(path))
        stored = config.get("rope_2d") if config["model_type"] != manifest.family else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); make the artifact again") from None
    stated = manifest.rope_2d.to_dict()
    faults = differing_keys("rope_2d", stated, stored) if stored or manifest.rope_2d.is_2d else []
    if faults:
        raise InputError(f"{path} has {faults[0]} as {directory / FILE_NAME} says; make the artifact again")
    return config | {"model_type": MODEL_TYPE_PREFIX + manifest.family, "rope_2d": stated}


def stored_tensors(directory: Path, manifest: Manifest) -> StoredTensors:
    """List the tensors of an artifact's files.

    Raises:
        InputError: a file that is not in safetensors format.
    """
    files: dict[str, str] = {}
    for file in (name for name in manifest.files if name.endswith(".safetensors")):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise InputError(f"{directory / file} cannot be read: {error}; make the artifact again") from None
    return StoredTensors(directory, files)
