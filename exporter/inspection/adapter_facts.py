"""Facts about an adapter file: its form, shapes and coverage, and the well-known bases that it can fit."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

from pos2d.config_values import ConfigValues, shown
from pos2d.errors import InputError
from pos2d.exporter.inspection.known_bases import KINDS, KNOWN_BASES
from pos2d.git_lfs import refuse_pointer
from pos2d.hashing import sha256
from pos2d.sources.adapters.adapter import first_names, module_kind, refuse_empty
from pos2d.sources.adapters.mlx import DOWN, MLX_WEIGHTS, UP, mlx_modules, read_mlx_settings, read_mlx_tensors
from pos2d.sources.adapters.patterns import match_start, pattern_error
from pos2d.sources.adapters.peft_config import KEY_OF_PATTERN
from pos2d.sources.adapters.peft_files import ADAPTER_CONFIG, PICKLED_WEIGHTS, weight_files
from pos2d.sources.adapters.trainer import SUFFIXES, pair_factors, read_trainer_tensors
from pos2d.sources.checkpoints.checkpoint import EMBEDDING
from pos2d.sources.files.json_object import read_json_object
from pos2d.sources.files.pth import read_pth
from pos2d.sources.files.tensor_places import torch_name

PEFT_PREFIX = "base_model.model."
# Old files have the adapter's name before ".weight"; a bias of B is not a factor.
PEFT_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.(?!bias$)[^.]+)??(?:\.weight)?$")
PEFT_SETTINGS = (
    *("base_model_name_or_path", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "bias", "modules_to_save", "layers_to_transform", "fan_in_fan_out", "trainable_token_indices"),
)
IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensors:
    """Shape and dtype of every tensor of a file; ``values`` reads one as a torch tensor."""

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    values: Callable[[str], Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """How many layers have this kind of module, which have none, and its shapes ``(out, in)``: normally one."""

    layers: int
    missing_layers: tuple[int, ...]
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """One adapter; delta = scale * B @ A.

    ``form``: ``trainer`` (its LoRA), ``state dict`` (its full fine-tune), ``peft`` or ``mlx``.
    ``layers``: number of layers up to the last one that is adapted. ``other_modules`` are outside the layers.
    ``untrained`` modules have a B of zeros, ``not_finite`` ones NaN or infinite factors. For a state dict these and
    ``sha256`` are left out, because they would need the whole file to be read.
    ``settings`` are those of a PEFT configuration. ``fits`` names the well-known bases with these shapes.
    """

    form: str
    file: str
    bytes: int
    sha256: str | None = None
    parameters: int
    dtypes: Mapping[str, int]
    ranks: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    layers: int
    modules: Mapping[str, ModuleKind]
    other_modules: tuple[str, ...]
    untrained: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    fits: tuple[str, ...]


def trainer_facts(path: Path) -> AdapterFacts:
    """Describe the trainer's LoRA or state dict.

    Raises:
        InputError: the file is neither, or lacks one of the factors of a module.
        UnsafeInputError: the file would run code.
    """
    content = read_trainer_tensors(path)
    tensors = _tensors(content)
    refuse_empty(tensors.shapes, path)
    if any(name.endswith(SUFFIXES) for name in content):
        factors = {module: (module + SUFFIXES[0], module + SUFFIXES[1]) for module in pair_factors(content, path)}
        return _low_rank_facts("trainer", path, tensors, factors, dict.fromkeys(factors, 1.0), {})
    if EMBEDDING not in content:
        raise InputError(
            f"{path} is not an adapter: no tensor is named *.lora.A.weight or *.lora.B.weight, and it is not the "
            "state dict of a whole model"
        )
    linears = {n.removesuffix(".weight"): s for n, s in tensors.shapes.items() if n.endswith("_proj.weight")}
    return _facts("state dict", path, tensors, linears)


def peft_facts(directory: Path) -> AdapterFacts:
    """Describe a PEFT directory.

    Raises:
        InputError: a configuration that cannot be read, another method than LoRA, no weights, or a missing factor.
        UnsafeInputError: the weights would run code.
    """
    config = _peft_config(directory)
    weights = weight_files(directory)
    path = weights.name
    tensors = _together(
        [_tensors(read_pth(f)) if f.name == PICKLED_WEIGHTS else _safetensors(f) for f in weights.files]
    )
    refuse_empty(tensors.shapes, path)
    pairs: dict[str, dict[str, str]] = {}
    for name in tensors.shapes:
        if factor := PEFT_FACTOR.search(name):
            pairs.setdefault(name[: factor.start()].removeprefix(PEFT_PREFIX), {})[factor[1]] = name
    incomplete = sorted(module for module, names in pairs.items() if len(names) < 2)
    if incomplete or not pairs:
        fault = (
            f"lacks one of the factors of {first_names(incomplete)}" if incomplete else "has no tensor *.lora_A.weight"
        )
        raise InputError(f"{path} {fault}; save the adapter again")
    factors = {module: (names["A"], names["B"]) for module, names in pairs.items()}
    values = ConfigValues(config, str(directory / ADAPTER_CONFIG))
    try:
        scales = {module: _peft_scale(module, tensors.shapes[a][0], values) for module, (a, _) in factors.items()}
    except TimeoutError as error:
        raise InputError(f"{directory / ADAPTER_CONFIG}: {error}") from None
    settings = {key: config[key] for key in PEFT_SETTINGS if config.get(key) not in (None, {}, [])}
    size = sum(file.stat().st_size for file in weights.files)
    facts = _low_rank_facts("peft", path, tensors, factors, scales, settings)
    return replace(facts, bytes=size, sha256=weights.sha256)


def mlx_facts(directory: Path) -> AdapterFacts:
    """Describe an adapter of MLX.

    Raises:
        InputError: settings that are not understood, no weights, or a missing factor.
    """
    content, file, settings = read_mlx_tensors(directory), directory / MLX_WEIGHTS, read_mlx_settings(directory)
    modules = mlx_modules(content, file, settings)
    factors = {module: (f"{module}.{DOWN}", f"{module}.{UP}") for module in modules}
    # MLX stores the factors of the transposed weight.
    tensors = _tensors({name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in content.items()})
    shown = {"fine_tune_type": settings.kind, "scale": settings.scale}
    return _low_rank_facts("mlx", file, tensors, factors, dict.fromkeys(factors, settings.scale), shown)


def _peft_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    config = read_json_object(path, "save the adapter again")
    if config.get("peft_type") != "LORA":
        method = config.get("peft_type")
        raise InputError(f"{path}: peft_type {shown(method)} is not LORA, the only PEFT method that can be merged here")
    return config


def _peft_scale(module: str, rank: int, config: ConfigValues) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; ``alpha_pattern`` has exceptions by the end of a module's name."""
    patterns = config.block("alpha_pattern")
    faults = [pattern for pattern in patterns.values if pattern_error(KEY_OF_PATTERN.format(pattern)) is not None]
    if faults:
        raise patterns.wrong(faults[0], "the value of a regular expression")
    matching = (key for key in patterns.values if match_start(KEY_OF_PATTERN.format(key), module))
    exception = next(matching, None)
    alpha = config.number("lora_alpha", None) if exception is None else patterns.number(exception)
    return float(alpha or rank) / (sqrt(rank) if config.switch("use_rslora", None) else rank)


def _safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    refuse_pointer(path)
    try:
        reader: Any = safe_open(path, framework="pt")
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return Tensors(
        shapes={name: tuple(piece.get_shape()) for name, piece in slices.items()},
        dtypes={name: torch_name(piece.get_dtype()) for name, piece in slices.items()},
        values=reader.get_tensor,
    )


def _together(parts: Sequence[Tensors]) -> Tensors:
    """The tensors of several files as those of one."""
    owner = {name: part for part in parts for name in part.shapes}
    return Tensors(
        shapes={name: part.shapes[name] for name, part in owner.items()},
        dtypes={name: part.dtypes[name] for name, part in owner.items()},
        values=lambda name: owner[name].values(name),
    )


def _tensors(content: Mapping[str, Any]) -> Tensors:
    """Describe torch tensors that are in memory already, or mapped."""
    return Tensors(
        shapes={name: tuple(tensor.shape) for name, tensor in content.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in content.items()},
        values=content.__getitem__,
    )


def _low_rank_facts(
    form: str,
    path: Path,
    tensors: Tensors,
    factors: Mapping[str, tuple[str, str]],
    scales: Mapping[str, float],
    settings: Mapping[str, Any],
) -> AdapterFacts:
    not_matrices = sorted(m for m, pair in factors.items() if any(len(tensors.shapes[name]) != 2 for name in pair))
    if not_matrices:
        raise InputError(f"{path}: the factors of {first_names(not_matrices)} are not matrices; save the adapter again")
    linears = {module: (tensors.shapes[b][0], tensors.shapes[a][1]) for module, (a, b) in factors.items()}
    ranks = {size for a, b in factors.values() for size in (tensors.shapes[a][0], tensors.shapes[b][1])}
    return _facts(
        form,
        path,
        tensors,
        linears,
        sha256=sha256(path),
        ranks=tuple(sorted(ranks)),
        scales=tuple(sorted(set(scales.values()))),
        untrained=tuple(m for m, (_, b) in sorted(factors.items()) if not tensors.values(b).any()),
        not_finite=tuple(m for m, pair in sorted(factors.items()) if not _finite(tensors, pair)),
        settings=settings,
    )


def _finite(tensors: Tensors, names: tuple[str, str]) -> bool:
    return all(bool(tensors.values(name).isfinite().all()) for name in names)


def _facts(form: str, path: Path, tensors: Tensors, linears: Mapping[str, Shape], **facts: Any) -> AdapterFacts:
    dtypes = list(tensors.dtypes.values())
    layer_of = {module: int(layer[1]) for module in linears if (layer := IN_LAYER.search(module))}
    layers = 1 + max(layer_of.values(), default=-1)
    modules = {
        name: _module_kind({layer_of[m]: linears[m] for m in layer_of if module_kind(m) == name}, layers)
        for name in sorted({module_kind(module) for module in layer_of}, key=_kind_order)
    }
    settings = facts.get("settings", {})
    some_layers = form in ("peft", "mlx") and settings.get("layers_to_transform") is not None
    return AdapterFacts(
        form=form,
        file=path.name,
        bytes=path.stat().st_size,
        parameters=sum(prod(shape) for shape in tensors.shapes.values()),
        dtypes={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        layers=layers,
        modules=modules,
        other_modules=tuple(sorted(set(linears) - set(layer_of))),
        fits=fitting_bases(form, modules, layers, some_layers=some_layers),
        **facts,
    )


def _kind_order(name: str) -> tuple[int, str]:
    return (KINDS.index(name) if name in KINDS else len(KINDS)), name


def _module_kind(shapes: Mapping[int, Shape], layers: int) -> ModuleKind:
    missing = tuple(layer for layer in range(layers) if layer not in shapes)
    return ModuleKind(len(shapes), missing, tuple(sorted(set(shapes.values()))))


def fitting_bases(
    form: str, modules: Mapping[str, ModuleKind], layers: int, *, some_layers: bool = False
) -> tuple[str, ...]:
    """Names of the well-known bases whose linear layers have these shapes.

    A trainer's LoRA must adapt every layer and all square kinds of the base, a state dict all kinds. A PEFT adapter
    adapts what its settings say; with ``some_layers`` these can leave out the base's last layers.
    """
    fitting = []
    for base in KNOWN_BASES:
        linears = base.linears()
        required = {"trainer": base.square(), "state dict": list(linears), "peft": [], "mlx": []}[form]
        same_shapes = all(adapted.shapes == (linears.get(name),) for name, adapted in modules.items())
        complete = form in ("peft", "mlx") or not any(adapted.missing_layers for adapted in modules.values())
        same_depth = layers <= base.layers if some_layers else layers == base.layers
        if modules and same_shapes and complete and same_depth and set(required) <= set(modules):
            fitting.append(base.name)
    return tuple(fitting)
