"""The trainer's files: pairs of low-rank factors by module, or the whole state of a full fine-tune."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.exporter.adapters.adapter import Adapter, check_values, kind, some
from pos2d.exporter.adapters.deltas import Change, LowRank, Replaced
from pos2d.exporter.artifact.staging import sha256
from pos2d.exporter.files.pth import read_pth
from pos2d.exporter.inputs.checkpoint import EMBEDDING, HEAD, Checkpoint

if TYPE_CHECKING:
    import torch

Factors = Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]

PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".lora.A.weight", ".lora.B.weight")
# Buffers that some states hold; loaders compute them from the configuration.
COMPUTED = "inv_freq"


def read_trainer_file(path: Path, base: Checkpoint, weight: float = 1.0) -> Adapter:
    """Read ``path`` without running code from it and hold every tensor against ``base``.

    Raises:
        InputError: neither a LoRA file nor a whole state, a missing or left-over tensor, shapes of another base, or
            values that are not finite.
        UnsafeInputError: the file would run code.
    """
    tensors = without_prefixes(read_pth(path), path)
    if any(name.endswith(SUFFIXES) for name in tensors):
        form, changes = "trainer", _low_rank(tensors, base, path, weight)
    elif EMBEDDING in tensors:
        form, changes = "state dict", _whole_state(tensors, base, path, weight)
    else:
        raise InputError(
            f"{path} is not a LoRA file: no tensor is named *.lora.A.weight or *.lora.B.weight, nor is it the state of "
            "a whole model"
        )
    check_values(tensors, path)
    return Adapter(path, form, sha256(path), weight, {name: (change,) for name, change in changes.items()})


def without_prefixes(content: "Mapping[str, torch.Tensor]", path: Path) -> "dict[str, torch.Tensor]":
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in content.items():
        short = name
        while short.startswith(PREFIXES):
            short = short.split(".", 1)[1]
        if short in tensors:
            raise InputError(f"{path}: tensor {name} is there twice, under different prefixes; save the adapter again")
        if not short.endswith(COMPUTED):
            tensors[short] = tensor
    return tensors


def _low_rank(tensors: "Mapping[str, torch.Tensor]", base: Checkpoint, path: Path, weight: float) -> dict[str, Change]:
    factors = pair_factors(tensors, path)
    _check_rank(factors, path)
    _check_fit(factors, base, path)
    return {f"{module}.weight": LowRank(weight, a, b) for module, (a, b) in factors.items()}


def pair_factors(tensors: "Mapping[str, torch.Tensor]", path: Path) -> Factors:
    extra = sorted(name for name in tensors if not name.endswith(SUFFIXES))
    if extra:
        raise InputError(f"{path} has tensors that are not LoRA factors: {some(extra)}; save the adapter alone")
    modules = sorted({name.removesuffix(SUFFIXES[0]).removesuffix(SUFFIXES[1]) for name in tensors})
    missing = [module + suffix for module in modules for suffix in SUFFIXES if module + suffix not in tensors]
    if missing:
        raise InputError(f"{path} lacks the tensor {some(missing)}; the file is not whole, save the adapter again")
    return {module: (tensors[module + SUFFIXES[0]], tensors[module + SUFFIXES[1]]) for module in modules}


def _check_rank(factors: Factors, path: Path) -> None:
    flat = sorted(module for module, (a, b) in factors.items() if a.dim() != 2 or b.dim() != 2)
    if flat:
        raise InputError(f"{path}: the factors of {some(flat)} are not matrices; save the adapter again")
    ranks = sorted({size for a, b in factors.values() for size in (a.shape[0], b.shape[1])})
    if len(ranks) != 1 or ranks[0] == 0:
        raise InputError(
            f"{path} mixes the ranks {', '.join(map(str, ranks))}; the trainer writes one rank above 0 for all modules"
        )


def _check_fit(factors: Factors, base: Checkpoint, path: Path) -> None:
    linears = base.linear_shapes()
    left_over = sorted(set(factors) - set(linears))
    kinds = {kind(module) for module in factors}
    square = {module for module, shape in linears.items() if shape[0] == shape[1]}
    owed = square | {module for module in linears if kind(module) in kinds}
    missing = sorted(owed - set(factors))
    wrong = [
        f"{module} ({b.shape[0]}, {a.shape[1]}) instead of {linears[module]}"
        for module, (a, b) in factors.items()
        if module in linears and (b.shape[0], a.shape[1]) != linears[module]
    ]
    _refuse_misfit({"wrong shapes": wrong, "missing modules": missing, "left-over modules": left_over}, base, path)


def _whole_state(
    tensors: "Mapping[str, torch.Tensor]", base: Checkpoint, path: Path, weight: float
) -> dict[str, Change]:
    """Every tensor of the base replaced; a tied head may be there as well and must then be the embedding."""
    import torch

    shapes = {name: place.shape for name, place in base.tensors.items()}
    if base.sizes.tied and HEAD in tensors:
        if not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise InputError(
                f"{path}: {HEAD} differs from {EMBEDDING}, but {base.directory} ties them; it is not clear "
                "which of the two was trained, save the model again or give a base that does not tie them"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    missing, left_over = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    _refuse_misfit({"wrong shapes": wrong, "missing tensors": missing, "left-over tensors": left_over}, base, path)
    changes: dict[str, Change] = {name: Replaced(weight, tensors[name]) for name in shapes}
    # Head and embedding were trained as one tensor, so both are replaced by it.
    return changes | ({HEAD: changes[EMBEDDING]} if base.sizes.tied else {})


def _refuse_misfit(faults: Mapping[str, list[str]], base: Checkpoint, path: Path) -> None:
    found = [f"{label} {some(names)}" for label, names in faults.items() if names]
    if found:
        raise InputError(
            f"{path} does not fit {base.directory}: {'; '.join(found)}; give the base that it was trained on"
        )
