"""Reads PEFT directories: adapter_config.json says which tensors must exist and what they mean."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.hashing import sha256
from pos2d.sources.adapters.adapter import Adapter, check_values, first_names
from pos2d.sources.adapters.deltas import Added, Delta, Dora, LowRank, Replaced, ReplacedRows
from pos2d.sources.adapters.peft_config import LoraSettings, read_settings
from pos2d.sources.adapters.peft_files import ADAPTER_CONFIG, MAGNITUDE, TOKENS, read_tensors, weight_files
from pos2d.sources.adapters.peft_modules import Coverage, Shape, cover, tensor_shapes
from pos2d.sources.adapters.vocabulary import check_replaced, resized, vocabulary_of
from pos2d.sources.checkpoints.checkpoint import EMBED_TOKENS, EMBEDDING, HEAD, LM_HEAD, Checkpoint

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

FACTORS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
TIED = (EMBEDDING, HEAD)


def read_peft(path: Path, base: Checkpoint, weight: float = 1.0) -> Adapter:
    """Read the directory ``path`` without running code from it and check every tensor against ``base``.

    Raises:
        InputError: a configuration with a key that is not understood, a missing or left-over tensor, shapes of another
            base, or values that are not finite.
        UnsafeInputError: adapter_model.bin would run code.
    """
    settings = read_settings(path / ADAPTER_CONFIG)
    try:
        coverage = cover(settings, base)
        _check_patterns(settings, coverage)
    except TimeoutError as error:
        raise InputError(f"{settings.file}: {error}") from None
    _refuse_unmergeable(settings, coverage, base)
    weights = weight_files(path)
    file = weights.name
    tensors = _without_copies(read_tensors(weights), coverage, file)
    vocab = vocabulary_of(tensors, base, file, weight)
    if vocab is not None:
        base = resized(base, vocab)
        coverage = cover(settings, base)
    _check_tokens(settings, coverage, base)
    _check_fit(tensors, settings, coverage, base, file)
    check_values(tensors, file)
    base_values = _base_values(tensors, coverage, base, file)
    if settings.dora and set(base_values) & {f"{module}.weight" for module in coverage.targets}:
        raise InputError(
            f"{file} has base weights {first_names(sorted(base_values))} of modules that use_dora rescales; save the "
            "adapter again with save_embedding_layers=False"
        )
    if settings.tying and base.sizes.tied:
        _check_tying(tensors, file)
    deltas: dict[str, list[Delta]] = defaultdict(list)
    replacements = {name: tensors[name] for name in (*coverage.saved, *coverage.biases)} | base_values
    if vocab is not None:
        check_replaced(replacements, file, vocab)
    for module, ids in coverage.tokens.items():
        _replace_rows(module, ids, tensors, replacements, deltas, weight)
    for name, tensor in replacements.items():
        deltas[name].append(Replaced(weight, tensor))
    for module in coverage.targets:
        for name, delta in _deltas_of(module, tensors, settings, weight).items():
            deltas[name].append(delta)
    if not deltas:
        raise InputError(f"{settings.file} names no module of {base.directory}; give the base that it was trained on")
    by_tensor = {name: tuple(of_tensor) for name, of_tensor in deltas.items()}
    return Adapter(path, "peft", weights.sha256, weight, by_tensor, config_sha256=sha256(settings.file), vocab=vocab)


def _check_patterns(settings: LoraSettings, coverage: Coverage) -> None:
    """Try every regular expression once, so that one that takes too long is refused here and not later."""
    for module in coverage.targets:
        settings.scale_of(module)


def _refuse_unmergeable(settings: LoraSettings, coverage: Coverage, base: Checkpoint) -> None:
    if settings.dora and EMBED_TOKENS in coverage.targets:
        # On the embedding PEFT rescales columns, whose norms are over all rows, so blocks of rows depend on each other.
        raise InputError(
            f"{settings.file}: use_dora on {EMBED_TOKENS} is not supported; exclude it from target_modules"
        )
    if settings.lora_bias and EMBED_TOKENS in coverage.targets:
        raise InputError(f"{settings.file}: lora_bias on {EMBED_TOKENS} has no meaning; exclude it from target_modules")
    without = [module for module in coverage.targets if f"{module}.bias" not in base.tensors]
    if settings.lora_bias and without:
        raise InputError(
            f"{settings.file}: lora_bias needs a bias in the base, but {first_names(without)} of {base.directory} has "
            "none; train without lora_bias"
        )


def _without_copies(tensors: "Tensors", coverage: Coverage, file: Path) -> "Tensors":
    """The tensors without second copies: some files hold a module of modules_to_save twice, and its old values too."""
    import torch

    unique = {}
    for name, tensor in tensors.items():
        trained = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if trained == name or trained not in coverage.saved:
            unique[name] = tensor
        elif ".modules_to_save." in name and not torch.equal(tensors.get(trained, tensor), tensor):
            raise InputError(f"{file}: {name} differs from {trained}; save the adapter again")
    return unique


def _check_fit(tensors: "Tensors", settings: LoraSettings, coverage: Coverage, base: Checkpoint, file: Path) -> None:
    expected = coverage.saved | coverage.biases
    for module, shape in coverage.targets.items():
        expected |= _factor_shapes(module, shape, settings)
    lost = sorted(set(coverage.biases) - set(coverage.saved) - set(tensors))
    if settings.bias == "lora_only" and len(lost) == len(coverage.biases) > 0:
        # PEFT releases that renamed the module to base_layer still saved its bias by the old name, which did not exist.
        raise InputError(
            f"{file} lacks the biases that bias 'lora_only' trained, {first_names(lost)}; older releases of PEFT lost "
            "them, train with a newer one or set bias to none to do without them"
        )
    expected |= _row_shapes(coverage, base)
    known = {name: tensor_shapes(base)[name] for name in TIED} | expected
    if base.sizes.tied and LM_HEAD in coverage.tokens:
        # PEFT saves the rows of a tied head with a vocabulary that was resized only; they are the embedding's.
        known[f"{LM_HEAD}.{TOKENS}"] = (len(coverage.tokens[LM_HEAD]), base.sizes.hidden)
    wrong = [
        f"{name} {tuple(tensor.shape)} instead of {known[name]}"
        for name, tensor in tensors.items()
        if name in known and tuple(tensor.shape) != known[name]
    ]
    missing, left_over = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(known))
    faults = {"wrong shapes": wrong, "missing tensors": missing, "left-over tensors": left_over}
    misfits = [f"{label} {first_names(names)}" for label, names in faults.items() if names]
    if misfits:
        raise InputError(
            f"{file} does not fit {base.directory} and {settings.file.name}: {'; '.join(misfits)}; give the base "
            "that it was trained on, or save the adapter again"
        )


def _check_tokens(settings: LoraSettings, coverage: Coverage, base: Checkpoint) -> None:
    for module, ids in coverage.tokens.items():
        if max(ids) >= base.sizes.vocab:
            raise InputError(
                f"{settings.file}: trainable_token_indices has {max(ids)}, but {module} of {base.directory} has "
                f"{base.sizes.vocab} rows; give the base that it was trained on, or save the adapter again with "
                "save_embedding_layers=True if tokens were added"
            )


def _row_shapes(coverage: Coverage, base: Checkpoint) -> dict[str, Shape]:
    """Names and shapes of the trained rows; a tied head has those of the embedding, unless it trained other ones."""
    rows = dict(coverage.tokens)
    if base.sizes.tied and rows.get(EMBED_TOKENS) == rows.get(LM_HEAD):
        rows.pop(LM_HEAD, None)
    return {f"{module}.{TOKENS}": (len(ids), base.sizes.hidden) for module, ids in rows.items()}


def _replace_rows(
    module: str,
    ids: tuple[int, ...],
    tensors: "Tensors",
    replacements: "dict[str, torch.Tensor]",
    deltas: dict[str, list[Delta]],
    weight: float,
) -> None:
    """Put trained rows into the tensor that the adapter saved in full, or else make them a delta of their own."""
    import torch

    name, index = f"{module}.weight", torch.tensor(ids)
    embedding_rows = tensors.get(f"{EMBED_TOKENS}.{TOKENS}")
    rows = tensors.get(f"{module}.{TOKENS}", embedding_rows)
    assert rows is not None  # the fit was checked
    if name in replacements:
        replacements[name] = replacements[name].clone()
        replacements[name][index] = rows.to(replacements[name].dtype)
    else:
        deltas[name].append(ReplacedRows(weight, index, rows))


def _factor_shapes(module: str, shape: Shape, settings: LoraSettings) -> dict[str, Shape]:
    """Names and shapes of the tensors that an adapted module of the given weight ``shape`` must have."""
    rank, (rows, columns) = settings.rank_of(module), shape
    if module == EMBED_TOKENS:
        a, b = EMBEDDING_FACTORS
        return {f"{module}.{a}": (rank, rows), f"{module}.{b}": (columns, rank)}
    a, b = FACTORS
    shapes: dict[str, Shape] = {f"{module}.{a}": (rank, columns), f"{module}.{b}": (rows, rank)}
    if settings.dora:
        shapes[f"{module}.{MAGNITUDE}"] = (rows,)
    if settings.lora_bias:
        shapes[f"{module}.lora_B.bias"] = (rows,)
    return shapes


def _base_values(tensors: "Tensors", coverage: Coverage, base: Checkpoint, file: Path) -> "dict[str, torch.Tensor]":
    """The base's embedding and head that PEFT may save with an adapter; where they are tied, one is used for both."""
    import torch

    free = [name for name in TIED if name not in coverage.saved]
    values = {name: tensors[name] for name in free if name in tensors}
    if base.sizes.tied and values:
        first, *others = values.values()
        if not all(torch.equal(first, other) for other in others):
            raise InputError(
                f"{file}: base weights {' and '.join(TIED)} differ, but {base.directory} ties them; save the adapter "
                "again or give a base that does not tie them"
            )
        values = dict.fromkeys(free, first)
    return values


def _check_tying(tensors: "Tensors", file: Path) -> None:
    """Check that embedding and head have the same deltas: PEFT saves both sides of a tied adapter."""
    import torch

    down, up = (tensors.get(f"{EMBED_TOKENS}.{factor}") for factor in EMBEDDING_FACTORS)
    a, b = (tensors.get(f"{LM_HEAD}.{factor}") for factor in FACTORS)
    embedding, head = (tensors.get(name) for name in TIED)
    pairs = [(embedding, head), (down, None if b is None else b.T), (up, None if a is None else a.T)]
    pairs.append((tensors.get(f"{EMBED_TOKENS}.{TOKENS}"), tensors.get(f"{LM_HEAD}.{TOKENS}")))
    if any(one is not None and other is not None and not torch.equal(one, other) for one, other in pairs):
        raise InputError(
            f"{file}: ensure_weight_tying is true, but the tensors of {EMBED_TOKENS} and {LM_HEAD} differ; it is not "
            "clear which of the two was trained, save the adapter again"
        )


def _deltas_of(module: str, tensors: "Tensors", settings: LoraSettings, weight: float) -> dict[str, Delta]:
    """Tensor name to delta, for the weight of an adapted module and for its bias where that is adapted."""
    scale, name = settings.scale_of(module), f"{module}.weight"
    if module == EMBED_TOKENS:
        # PEFT stores these factors for the transposed weight.
        down, up = (tensors[f"{module}.{factor}"] for factor in EMBEDDING_FACTORS)
        return {name: LowRank(weight, up.T, down.T, scale)}
    a, b = (tensors[f"{module}.{factor}"] for factor in FACTORS)
    if settings.dora:
        return {name: Dora(weight, a, b, tensors[f"{module}.{MAGNITUDE}"], scale)}
    deltas: dict[str, Delta] = {name: LowRank(weight, a, b, scale)}
    if settings.lora_bias:
        deltas[f"{module}.bias"] = Added(weight * scale, tensors[f"{module}.lora_B.bias"])
    return deltas
