"""Which modules of a base PEFT adapts and which it saves in full, by PEFT's own rules for matching names."""

from collections.abc import Iterator
from dataclasses import dataclass

from pos2d.errors import InputError
from pos2d.sources.adapters.adapter import first_names, module_kind
from pos2d.sources.adapters.patterns import match_start, matches_whole
from pos2d.sources.adapters.peft_config import LAYER_NUMBER, SAVED_MODULE, LoraSettings
from pos2d.sources.checkpoints.checkpoint import EMBED_TOKENS, EMBEDDING, HEAD, LM_HEAD, Checkpoint

Shape = tuple[int, ...]

# PEFT recognises embedding and head by the last part of their names.
EMBEDDING_KINDS = {"embed_tokens", "lm_head"}


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """What the adapter's file must hold by its configuration, each with the shape of the base's tensor.

    ``targets``: adapted modules; ``saved``: tensors saved in full; ``biases``: tensors of trained biases; ``tokens``:
    module to the rows of it that were trained as rows.
    """

    targets: dict[str, Shape]
    saved: dict[str, Shape]
    biases: dict[str, Shape]
    tokens: dict[str, tuple[int, ...]]


def cover(settings: LoraSettings, base: Checkpoint) -> Coverage:
    """Apply a configuration to the modules of ``base``.

    Raises:
        InputError: a module is both adapted and saved in full, or rows of another module than embedding and head.
    """
    shapes = tensor_shapes(base)
    tied = _tied_together(settings) if settings.tying and base.sizes.tied else ""
    saved = {
        name: shape
        for name, shape in shapes.items()
        if _is_saved(settings, name) or (tied == "saved" and name.removesuffix(".weight") in (EMBED_TOKENS, LM_HEAD))
    }
    targets = {
        module: shape
        for module, shape in _module_shapes(base).items()
        if _is_target(settings, module) or (tied == "targets" and module in (EMBED_TOKENS, LM_HEAD))
    }
    both = [module for module in targets if f"{module}.weight" in saved]
    if both:
        raise InputError(
            f"{settings.file}: target_modules and modules_to_save both name {first_names(both)}; leave it in one of "
            "them"
        )
    trained = {"none": set(), "all": set(shapes), "lora_only": {f"{m}.bias" for m in targets}}[settings.bias]
    biases = {name: shape for name, shape in shapes.items() if name.endswith(".bias") and name in trained}
    return Coverage(targets, saved, biases, _token_rows(settings, targets, base))


def _token_rows(settings: LoraSettings, targets: dict[str, Shape], base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Module to its trained rows. On a tied base the head has those of the embedding, unless it has others itself."""
    rows: dict[str, tuple[int, ...]] = {}
    for name, ids in settings.tokens.items():
        module = next((module for module in (EMBED_TOKENS, LM_HEAD) if module.endswith(name)), None)
        if module is None:
            raise InputError(
                f"{settings.file}: trainable_token_indices names {name}, but only rows of {EMBED_TOKENS} and {LM_HEAD} "
                "can be merged; train that module in modules_to_save instead"
            )
        rows[module] = ids
    if base.sizes.tied and EMBED_TOKENS in rows:
        rows.setdefault(LM_HEAD, rows[EMBED_TOKENS])
    both = sorted(set(rows) & set(targets))
    if both:
        raise InputError(
            f"{settings.file}: trainable_token_indices and target_modules both change {first_names(both)}; train it in "
            "one of the two ways"
        )
    return rows


def tensor_shapes(base: Checkpoint) -> dict[str, Shape]:
    """Shapes of the base's tensors and of its head, which PEFT trains as a tensor of its own even where it is tied."""
    shapes = {name: place.shape for name, place in base.tensors.items()}
    return {HEAD: shapes[EMBEDDING], **shapes}


def _module_shapes(base: Checkpoint) -> dict[str, Shape]:
    shapes = tensor_shapes(base)
    return base.linear_shapes() | {module: shapes[f"{module}.weight"] for module in (EMBED_TOKENS, LM_HEAD)}


def _tied_together(settings: LoraSettings) -> str:
    """``saved`` or ``targets`` if that names embedding or head: with ``ensure_weight_tying`` one implies the other."""
    if any(module_kind(name) in EMBEDDING_KINDS for name in settings.saved):
        return "saved"
    if isinstance(settings.targets, str):
        named = any(matches_whole(settings.targets, name) for name in EMBEDDING_KINDS)
    else:
        named = any(module_kind(name) in EMBEDDING_KINDS for name in settings.targets)
    return "targets" if named else ""


def _is_saved(settings: LoraSettings, tensor: str) -> bool:
    """Whether ``modules_to_save`` names a tensor's module, by any suffix: ``norm`` matches ``input_layernorm``."""
    return any(module.endswith(settings.saved) for module in _parents(tensor))


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_target(settings: LoraSettings, module: str) -> bool:
    saved = (SAVED_MODULE.format(text) for text in settings.saved)
    if _is_named(settings.excluded, module) or any(match_start(pattern, module) for pattern in saved):
        return False
    if isinstance(settings.targets, str):
        if settings.targets.lower() == "all-linear":
            return module not in (EMBED_TOKENS, LM_HEAD)
        return _is_named(settings.targets, module)
    # A module that is named in full is adapted whatever layers_to_transform says.
    return module in settings.targets or (_is_named(settings.targets, module) and _is_in_layers(settings, module))


def _is_named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return matches_whole(names, module)
    return module in names or module.endswith(tuple(f".{name}" for name in names))


def _is_in_layers(settings: LoraSettings, module: str) -> bool:
    if not settings.layers:
        return True
    # Without a pattern, the first number in the name is the layer's.
    for text in settings.layers_pattern or (r"[^.]*",):
        match = match_start(LAYER_NUMBER.format(text), module)
        if match:
            return int(match["idx"]) in settings.layers
    return False
