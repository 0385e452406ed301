"""Reads adapters of mlx-lm: factors for the transposed weight, and a configuration of its own."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.hashing import sha256
from pos2d.sources.adapters.adapter import Adapter, check_values, first_names
from pos2d.sources.adapters.deltas import Delta, Dora, LowRank
from pos2d.sources.adapters.peft_config import shortened
from pos2d.sources.adapters.peft_files import ADAPTER_CONFIG, WeightFiles, read_tensors
from pos2d.sources.checkpoints.checkpoint import EMBED_TOKENS, EMBEDDING, HEAD, Checkpoint
from pos2d.sources.files.json_object import read_json_object

if TYPE_CHECKING:
    import torch

MLX_WEIGHTS = "adapters.safetensors"
# What it saves during a training, with the number of steps before the name.
MLX_CHECKPOINTS = f"[0-9]*_{MLX_WEIGHTS}"
MLX_KEYS = {"fine_tune_type", "lora_parameters", "lora_layers"}
DOWN, UP, MAGNITUDE = "lora_a", "lora_b", "m"


@dataclass(frozen=True, slots=True)
class MlxSettings:
    """``kind``: lora or dora; ``scale``: the factor of the product of the factors."""

    file: Path
    kind: str
    rank: int | None
    scale: float


def is_mlx(directory: Path) -> bool:
    """Whether the adapter in ``directory`` was written by mlx-lm and not by PEFT."""
    config = read_json_object(directory / ADAPTER_CONFIG, "save the adapter again")
    return "peft_type" not in config and bool(MLX_KEYS & set(config) or (directory / MLX_WEIGHTS).is_file())


def read_mlx_settings(directory: Path) -> MlxSettings:
    """Read and check the configuration.

    Raises:
        InputError: another kind of fine-tuning, or no scale that means the same in every release of mlx-lm.
    """
    file = directory / ADAPTER_CONFIG
    config = read_json_object(file, "save the adapter again")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(
            f"{file}: MLX's fine_tune_type {kind!r} is not lora or dora; fuse it with mlx_lm.fuse, or train a LoRA"
        )
    parameters: Any = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise InputError(f"{file}: MLX's lora_parameters is {parameters!r}, so the scale is not known; train it again")
    if "alpha" in parameters:
        raise InputError(
            f"{file}: MLX's lora_parameters has alpha, which its releases use differently; give one scale that is the "
            "factor of the product in the release that trained it, and remove alpha"
        )
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < abs(scale) < sys.maxsize:
        raise InputError(
            f"{file}: MLX's scale is {shortened(scale)}, not a number other than 0; train the adapter again"
        )
    return MlxSettings(file, str(kind), rank if type(rank) is int else None, float(scale))


def read_mlx(directory: Path, base: Checkpoint, weight: float = 1.0) -> Adapter:
    """Read an adapter of mlx-lm and check every tensor against ``base``.

    Raises:
        InputError: settings that are not understood, a missing or left-over tensor, shapes of another base, or values
            that are not finite.
    """
    settings, file = read_mlx_settings(directory), directory / MLX_WEIGHTS
    modules = mlx_modules(read_mlx_tensors(directory), file, settings)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for module, tensors in modules.items():
        check_values({f"{module}.{part}": tensor for part, tensor in tensors.items()}, file)
        for name, delta in _deltas_of(module, tensors, base, settings, weight).items():
            _check_fit(name, delta, base, file, settings)
            deltas[name] = (delta,)
    return Adapter(directory, "mlx", sha256(file), weight, deltas, config_sha256=sha256(settings.file))


def read_mlx_tensors(directory: Path) -> "dict[str, torch.Tensor]":
    """All tensors by name; raises InputError if there are none that can be read."""
    file = directory / MLX_WEIGHTS
    if not file.is_file():
        checkpoints = sorted(path.name for path in directory.glob(MLX_CHECKPOINTS))
        cure = f"copy {checkpoints[-1]} to that name" if checkpoints else "copy the adapter again"
        raise InputError(f"{directory} has an {ADAPTER_CONFIG} of MLX but no {MLX_WEIGHTS}; {cure}")
    return read_tensors(WeightFiles((file,)))


def mlx_modules(
    tensors: "Mapping[str, torch.Tensor]", file: Path, settings: MlxSettings
) -> "dict[str, dict[str, torch.Tensor]]":
    """Module name to its tensors by part.

    Raises:
        InputError: a tensor that is no part of a LoRA, or a part that is missing.
    """
    parts = {DOWN, UP} | ({MAGNITUDE} if settings.kind == "dora" else set())
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in parts:
            raise InputError(f"{file}: tensor {name} is no part of MLX's {settings.kind}; save the adapter again")
        modules[module][part] = tensor
    missing = [f"{module}.{part}" for module, found in sorted(modules.items()) for part in sorted(parts - set(found))]
    if missing or not modules:
        raise InputError(f"{file} lacks the tensor {first_names(missing) or '*.lora_a'}; save the adapter again")
    flat = sorted(m for m, found in modules.items() if found[DOWN].dim() != 2 or found[UP].dim() != 2)
    if flat:
        raise InputError(f"{file}: MLX's factors of {first_names(flat)} are not matrices and cannot be merged here")
    return dict(modules)


def _deltas_of(
    module: str, tensors: "Mapping[str, torch.Tensor]", base: Checkpoint, settings: MlxSettings, weight: float
) -> dict[str, Delta]:
    down, up = tensors[DOWN], tensors[UP]
    if module == EMBED_TOKENS and settings.kind == "lora":
        # Factors of an embedding are not transposed; mlx-lm uses an embedding that is also the head with them.
        delta: Delta = LowRank(weight, up, down, settings.scale)
        return {EMBEDDING: delta} | ({HEAD: delta} if base.sizes.tied else {})
    if settings.kind == "dora":
        return {f"{module}.weight": Dora(weight, down.T, up.T, tensors[MAGNITUDE], settings.scale)}
    return {f"{module}.weight": LowRank(weight, down.T, up.T, settings.scale)}


def _check_fit(name: str, delta: Delta, base: Checkpoint, file: Path, settings: MlxSettings) -> None:
    tensors = delta.tensors()
    shapes = {f"{module}.weight": shape for module, shape in base.linear_shapes().items()}
    expected = {**shapes, EMBEDDING: base.tensors[EMBEDDING].shape}.get(name)
    found = (int(tensors["b"].shape[0]), int(tensors["a"].shape[1]))
    ranks = {int(tensors["a"].shape[0]), int(tensors["b"].shape[1]), settings.rank or delta.rank}
    if name == EMBEDDING and settings.kind == "dora":
        raise InputError(f"{file}: MLX's dora on {EMBED_TOKENS} is not supported; train it without")
    if expected is None:
        raise InputError(f"{file} adapts {name}, which {base.directory} does not have; give the base of its training")
    if found != expected or len(ranks) > 1:
        raise InputError(
            f"{file} does not fit {base.directory} and {settings.file.name}: {name} is {found} of rank {delta.rank} "
            f"instead of {expected} of rank {settings.rank or delta.rank}; give the base of its training"
        )
    if "magnitude" in tensors and tuple(tensors["magnitude"].shape) != expected[:1]:
        raise InputError(f"{file}: the tensor m of {name} does not have {expected[0]} values; save the adapter again")
