"""Reads adapter_config.json of PEFT's LoRA: every key is used, known to be harmless, or refused by name."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pos2d.errors import InputError
from pos2d.sources.adapters.patterns import match_start, pattern_error
from pos2d.sources.files.json_object import read_json_object

Value = TypeVar("Value", int, float)

# Keys that read_settings below uses.
USED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Keys about training, provenance or initial values, which do not change what the saved tensors mean.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA works only after these tokens and cannot be merged; train without it",
    "arrow_config": "a router that chooses adapters token by token cannot be merged; merge one of its adapters",
    "enable_lora": "factors for parts of one fused layer are not supported; train one adapter for each projection",
    "fan_in_fan_out": "the weights of these families are [out, in]; set it to false if the adapter was trained on them",
    "kasa_config": "it is trained on truncated base weights; train without it",
    "layer_replication": "it is trained on repeated layers, which the base does not have; train without it",
    "megatron_config": "the layers of Megatron are not supported; train on the Hugging Face model",
    "monteclora_config": "sampled weights are not supported; train without it",
    "target_parameters": "only whole modules are supported; name them in target_modules",
    "use_bdlora": "block-diagonal factors are not supported; train without it",
    "use_qalora": "pooled inputs are not supported; train without it",
    "velora_config": "compressed activations are not supported; train without it",
}
PLAIN_INITS = ("eva", "gaussian", "mica", "orthogonal")
RESIDUAL_INITS = ("corda", "lora_ga", "olora", "pissa")
# The module that trainable_token_indices means where it names none.
EMBEDDING_NAME = "embed_tokens"
# How PEFT builds regular expressions from texts of a configuration; they are matched against module names.
WHOLE = "{}"
KEY_OF_PATTERN = r"(.*\.)?({})$"
SAVED_MODULE = r"(^|.*\.){}($|\..*)"
LAYER_NUMBER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."


@dataclass(frozen=True, slots=True, eq=False)
class LoraSettings:
    """The settings of one adapter that say which tensors it has and what they mean.

    ``targets`` and ``excluded`` are a regular expression or module names; an empty ``layers`` means every layer.
    ``tokens``: by the end of a module's name, the rows that were trained as rows.
    """

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    bias: str
    lora_bias: bool
    dora: bool
    tying: bool
    tokens: Mapping[str, tuple[int, ...]]

    def rank_of(self, module: str) -> int:
        return self._value_for("rank_pattern", self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of ``lora_B @ lora_A``."""
        rank = self.rank_of(module)
        alpha = self._value_for("alpha_pattern", self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def _value_for(self, key: str, pattern: Mapping[str, Value], module: str, default: Value) -> Value:
        values = {value for text, value in pattern.items() if match_start(KEY_OF_PATTERN.format(text), module)}
        if len(values) > 1:
            # PEFT uses the first match but sorts the keys when it saves them, so the order of the training is lost.
            raise InputError(f"{self.file}: {key} has several values for {module}; leave one that matches it")
        return values.pop() if values else default


def read_settings(file: Path) -> LoraSettings:
    """Read and check a configuration.

    Raises:
        InputError: unreadable, not a LoRA, a key that is unknown or not supported, or a value of the wrong type.
    """
    config = _read_json(file)
    _refuse_unsupported(config, file)
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise InputError(f"{file}: bias is {bias!r}, not none, all or lora_only; save the adapter again")
    settings = LoraSettings(
        file=file,
        rank=_rank(config.get("r"), "r", file),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha", file),
        rank_pattern={k: _rank(v, "rank_pattern", file) for k, v in _pattern(config, "rank_pattern", file).items()},
        alpha_pattern={k: _alpha(v, "alpha_pattern", file) for k, v in _pattern(config, "alpha_pattern", file).items()},
        rank_stabilised=_flag(config, "use_rslora", file),
        targets=_names_or_regex(config, "target_modules", file),
        excluded=_names_or_regex(config, "exclude_modules", file),
        layers=_layers(config.get("layers_to_transform"), file),
        layers_pattern=_layers_pattern(config, file),
        saved=_names(config.get("modules_to_save"), "modules_to_save", file),
        bias=bias,
        lora_bias=_flag(config, "lora_bias", file),
        dora=_flag(config, "use_dora", file),
        tying=_flag(config, "ensure_weight_tying", file),
        tokens=_tokens(config.get("trainable_token_indices"), file),
    )
    for text in settings.saved:
        _check_regex(text, SAVED_MODULE, "modules_to_save", file)
    _refuse_contradictions(settings, config)
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the directory that PEFT saved")
    return read_json_object(file, "save the adapter again")


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: peft_type {config.get('peft_type')!r} is not supported; give an adapter of type LORA"
        )
    for key, value in sorted(config.items()):
        unset = value is None or value is False or value in ("", [], {})
        if key in USED | HARMLESS or unset:
            continue
        if key in REFUSED:
            raise InputError(f"{file}: {key} is set, {REFUSED[key]}")
        raise InputError(f"{file}: unknown key {key!r}; its meaning is not known, save the adapter with PEFT 0.21")
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(RESIDUAL_INITS):
        raise InputError(
            f"{file}: init_lora_weights {init!r} changes the base weights as well; convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT"
        )
    if name == "loftq":
        raise InputError(
            f"{file}: init_lora_weights 'loftq' changes the base weights as well; merge the adapter with PEFT into the "
            "base that LoftQ quantised, or train without it"
        )
    if name not in PLAIN_INITS and not (init is None or isinstance(init, bool)):
        raise InputError(f"{file}: init_lora_weights {init!r} is not known; save the adapter with PEFT 0.21")


def _refuse_contradictions(settings: LoraSettings, config: Mapping[str, Any]) -> None:
    if config.get("target_modules") is None:
        raise InputError(f"{settings.file}: target_modules is missing; save the adapter again")
    if isinstance(settings.targets, str) and settings.layers:
        raise InputError(
            f"{settings.file}: layers_to_transform cannot be used where target_modules is a regular expression; "
            "name the layers in the expression"
        )
    if settings.dora and settings.lora_bias:
        raise InputError(f"{settings.file}: lora_bias is not supported together with use_dora; train without one")


def shortened(value: object) -> str:
    """A value for a sentence; Python does not print whole numbers of thousands of digits."""
    return "a number with too many digits" if isinstance(value, int) and abs(value) >= 10**100 else repr(value)


def _rank(value: object, key: str, file: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < sys.maxsize:
        raise InputError(f"{file}: {key} has {shortened(value)}, not a whole number above 0; save the adapter again")
    return value


def _alpha(value: object, key: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.maxsize:
        raise InputError(f"{file}: {key} has {shortened(value)}, not a number above 0; save the adapter again")
    return float(value)


def _flag(config: Mapping[str, Any], key: str, file: Path) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise InputError(f"{file}: {key} has {value!r}, not true or false; save the adapter again")
    return bool(value)


def _names(value: object, key: str, file: Path) -> tuple[str, ...]:
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{file}: {key} has {value!r}, not a list of names; save the adapter again")
    return tuple(names)


def _names_or_regex(config: Mapping[str, Any], key: str, file: Path) -> str | tuple[str, ...]:
    value = config.get(key)
    if not isinstance(value, str):
        return _names(value, key, file)
    _check_regex(value, WHOLE, key, file)
    return value


def _pattern(config: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{file}: {key} has {value!r}, not an object; save the adapter again")
    for text in value:
        _check_regex(text, KEY_OF_PATTERN, key, file)
    return value


def _tokens(value: object, file: Path) -> dict[str, tuple[int, ...]]:
    """Token ids by the end of a module's name; a plain list is that of the embedding."""
    by_module: dict[str, Any] = value if isinstance(value, dict) else {EMBEDDING_NAME: value} if value else {}
    for ids in by_module.values():
        fine = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
        if not fine or len(set(ids)) < len(ids):
            raise InputError(
                f"{file}: trainable_token_indices has {ids!r}, not a list of different ids; save the adapter again"
            )
    return {name: tuple(ids) for name, ids in by_module.items() if ids}


def _layers(value: object, file: Path) -> tuple[int, ...]:
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise InputError(f"{file}: layers_to_transform has {value!r}, not numbers of layers; save the adapter again")
    return tuple(layers)


def _layers_pattern(config: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    value = config.get("layers_pattern")
    names = _names([value] if isinstance(value, str) and value else value or None, "layers_pattern", file)
    for text in names:
        _check_regex(text, LAYER_NUMBER, "layers_pattern", file)
    return names


def _check_regex(text: str, template: str, key: str, file: Path) -> None:
    fault = pattern_error(template.format(text))
    if fault is not None:
        raise InputError(f"{file}: {key} has {text!r}, not a regular expression: {fault}; save the adapter again")
