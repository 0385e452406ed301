"""Reads the trainer's files: pairs of low-rank factors by module, or the state dict of a full fine-tune."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.hashing import sha256
from pos2d.sources.adapters.adapter import Adapter, check_values, first_names, module_kind, refuse_empty
from pos2d.sources.adapters.deltas import Delta, LowRank, Replaced
from pos2d.sources.adapters.vocabulary import resized, vocabulary_of
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from pos2d.sources.checkpoints.minimind import ITS_VOCABULARY, describe_minimind, has_its_vocabulary
from pos2d.sources.files.pth import load_pth, tensors_of

if TYPE_CHECKING:
    import torch

Factors = Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]

PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".lora.A.weight", ".lora.B.weight")
# Buffers in some state dicts; loaders compute them from the configuration.
COMPUTED = "inv_freq"
BASE_OF_TRAINING = "give the base that it was trained on"


def read_trainer_file(path: Path, base: Checkpoint, weight: float = 1.0) -> Adapter:
    """Read ``path`` without running code from it and check every tensor against ``base``.

    Raises:
        InputError: neither a LoRA file nor a full state dict, a missing or left-over tensor, shapes of another base, or
            values that are not finite.
        UnsafeInputError: the file would run code.
    """
    tensors = read_trainer_tensors(path)
    refuse_empty({name: tensor.shape for name, tensor in tensors.items()}, path)
    vocab = None
    if any(name.endswith(SUFFIXES) for name in tensors):
        form, deltas = "trainer", _low_rank(tensors, base, path, weight)
    elif EMBEDDING in tensors:
        vocab = vocabulary_of(tensors, base, path, weight)
        form, deltas = "state dict", _full_state(tensors, resized(base, vocab) if vocab else base, path, weight)
    else:
        raise InputError(
            f"{path} is not a LoRA file: no tensor is named *.lora.A.weight or *.lora.B.weight, nor is it the state "
            "dict of a whole model"
        )
    check_values(tensors, path)
    by_tensor = {name: (delta,) for name, delta in deltas.items()}
    return Adapter(path, form, sha256(path), weight, by_tensor, vocab=vocab)


def read_trainer_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a ``.pth`` under their plain names; the bytes stay in the file until they are used.

    Raises:
        InputError: not a dictionary of tensors, or a model of ParallelMind's own architecture; two tensors of one name.
        UnsafeInputError: the file would run code.
    """
    content = load_pth(path)
    own = describe_minimind(content) if isinstance(content, Mapping) else None
    if own is not None:
        raise InputError(f"{path} {own}")
    return without_prefixes(tensors_of(content, path), path)


def without_prefixes(content: "Mapping[str, torch.Tensor]", path: Path) -> "dict[str, torch.Tensor]":
    """The tensors under their plain names, without what wrappers of a model put before them.

    Raises:
        InputError: two tensors have the same plain name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in content.items():
        short = name
        while short.startswith(PREFIXES):
            short = short.split(".", 1)[1]
        if short in tensors:
            raise InputError(f"{path}: tensor {name} occurs twice, under different prefixes; save the adapter again")
        if not short.endswith(COMPUTED):
            tensors[short] = tensor
    return tensors


def _low_rank(tensors: "Mapping[str, torch.Tensor]", base: Checkpoint, path: Path, weight: float) -> dict[str, Delta]:
    factors = pair_factors(tensors, path)
    _check_rank(factors, path)
    _check_fit(factors, base, path)
    return {f"{module}.weight": LowRank(weight, a, b) for module, (a, b) in factors.items()}


def pair_factors(tensors: "Mapping[str, torch.Tensor]", path: Path) -> Factors:
    """Module name to its factors A ``[r, in]`` and B ``[out, r]``.

    Raises:
        InputError: a tensor that is no factor, or a factor without its partner.
    """
    extra = sorted(name for name in tensors if not name.endswith(SUFFIXES))
    if extra:
        raise InputError(f"{path} has tensors that are not LoRA factors: {first_names(extra)}; save the adapter alone")
    modules = sorted({name.removesuffix(SUFFIXES[0]).removesuffix(SUFFIXES[1]) for name in tensors})
    missing = [module + suffix for module in modules for suffix in SUFFIXES if module + suffix not in tensors]
    if missing:
        raise InputError(
            f"{path} lacks the tensor {first_names(missing)}; the file is incomplete, save the adapter again"
        )
    return {module: (tensors[module + SUFFIXES[0]], tensors[module + SUFFIXES[1]]) for module in modules}


def _check_rank(factors: Factors, path: Path) -> None:
    flat = sorted(module for module, (a, b) in factors.items() if a.dim() != 2 or b.dim() != 2)
    if flat:
        raise InputError(f"{path}: the factors of {first_names(flat)} are not matrices; save the adapter again")
    ranks = sorted({size for a, b in factors.values() for size in (a.shape[0], b.shape[1])})
    if len(ranks) != 1 or ranks[0] == 0:
        raise InputError(
            f"{path} mixes the ranks {', '.join(map(str, ranks))}; the trainer writes one rank above 0 for all modules"
        )


def _check_fit(factors: Factors, base: Checkpoint, path: Path) -> None:
    linears = base.linear_shapes()
    left_over = sorted(set(factors) - set(linears))
    kinds = {module_kind(module) for module in factors}
    square = {module for module, shape in linears.items() if shape[0] == shape[1]}
    expected = square | {module for module in linears if module_kind(module) in kinds}
    missing = sorted(expected - set(factors))
    wrong = [
        f"{module} ({b.shape[0]}, {a.shape[1]}) instead of {linears[module]}"
        for module, (a, b) in factors.items()
        if module in linears and (b.shape[0], a.shape[1]) != linears[module]
    ]
    _refuse_misfit({"wrong shapes": wrong, "missing modules": missing, "left-over modules": left_over}, base, path)


def _full_state(tensors: "Mapping[str, torch.Tensor]", base: Checkpoint, path: Path, weight: float) -> dict[str, Delta]:
    """A replacement of every tensor of the base; a tied head may be in the file too and must equal the embedding."""
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
    cure = f"it {ITS_VOCABULARY}" if has_its_vocabulary(tensors) else BASE_OF_TRAINING
    faults = {"wrong shapes": wrong, "missing tensors": missing, "left-over tensors": left_over}
    _refuse_misfit(faults, base, path, cure)
    deltas: dict[str, Delta] = {name: Replaced(weight, tensors[name]) for name in shapes}
    # Head and embedding were trained as one tensor, so both are replaced by it.
    return deltas | ({HEAD: deltas[EMBEDDING]} if base.sizes.tied else {})


def _refuse_misfit(faults: Mapping[str, list[str]], base: Checkpoint, path: Path, cure: str = BASE_OF_TRAINING) -> None:
    misfits = [f"{label} {first_names(names)}" for label, names in faults.items() if names]
    if misfits:
        raise InputError(f"{path} does not fit {base.directory}: {'; '.join(misfits)}; {cure}")
