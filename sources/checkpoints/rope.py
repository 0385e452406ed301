"""The rope settings of a configuration, as transformers takes them where it has them in several places.

transformers 4 reads ``rope_theta`` and ``rope_scaling``. transformers 5 reads the first of ``rope_scaling`` and
``rope_parameters`` that is not empty, and ``rope_theta`` where that block has none.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pos2d.config_values import MISSING, ConfigValues, shown
from pos2d.errors import InputError
from pos2d.families import DEFAULTS, FULL, MODEL_TYPE_PREFIX, SLIDING, Dimensions

Settings = dict[str, Any]
SCALING, PARAMETERS, THETA, KIND = "rope_scaling", "rope_parameters", "rope_theta", "rope_type"
ORIGINAL = "original_max_position_embeddings"
DEFAULT_THETA = 10000.0
PARTIAL = "partial_rotary_factor"
# The settings of every rope type that can be baked: the required ones, then those that may be missing or null.
NUMBERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
}
STRETCHED = ("llama3", "yarn")
# Factors of single frequencies, one list for each length of a sequence; baked only where both are the same.
LONGROPE, SHORT, LONG, FACTOR, ATTENTION = "longrope", "short_factor", "long_factor", "factor", "attention_factor"
# From the block and the whole configuration: by how much positions are stretched, and from which length.
StretchOf = Callable[[ConfigValues, ConfigValues], tuple[float, int]]


def rope_settings(config: Mapping[str, Any], source: str = "config.json") -> Settings:
    """Type, theta and the settings of that type, as transformers 5 and 4.57 take them from a ``config.json``.

    Raises:
        InputError: a type that cannot be baked, a setting of another type, or places that make the two releases
            disagree; ``source`` names the file.
    """
    values = ConfigValues(config, source)
    for block in (values, values.block(SCALING), values.block(PARAMETERS)):
        if block.has(PARTIAL) and block.number(PARTIAL) != 1:
            raise InputError(f"{source}: {block.path}{PARTIAL} is not supported; all of a head must be rotary")
    newer = _checked(_of_5(values), values, _stretch_of_5)
    # A configuration that transformers 5 wrote has neither key, and transformers 4 cannot read its rope settings.
    if values.has(THETA) or values.block(SCALING).values:
        older = _checked(_of_4(values), values, _stretch_of_4)
        if older != newer:
            raise InputError(
                f"{source}: transformers 4 takes {_text(older, newer)} from {THETA} and {SCALING}, and transformers 5 "
                f"takes {_text(newer, older)} from {_place(values)}; keep the one that the adapter was trained with"
            )
    return newer


def _of_5(values: ConfigValues) -> tuple[ConfigValues, str, Any]:
    """The block that transformers 5 reads, with its type and theta."""
    block = values.block(_place(values))
    if {SLIDING, FULL} & set(block.values):
        raise InputError(f"{values.source}: {block.path}* differs by kind of layer, which is not supported")
    kind = block.text(KIND, MISSING) if KIND in block.values else block.text("type", "default")
    theta = block.number(THETA) if THETA in block.values else values.number(THETA, DEFAULT_THETA)
    return block, kind, theta


def _of_4(values: ConfigValues) -> tuple[ConfigValues, str, Any]:
    """The block that transformers 4.57 reads, with its type and theta."""
    block = values.block(SCALING)
    theta = values.number(THETA, DEFAULT_THETA)
    if not block.values:
        return block, "default", theta
    # Mistral's class leaves the block as it is; those of the others let the older key win.
    keys = (KIND, "type") if values.text("model_type").endswith("mistral") else ("type", KIND)
    return block, block.text(next((key for key in keys if key in block.values), KIND)), theta


def _checked(found: tuple[ConfigValues, str, Any], values: ConfigValues, stretch_of: StretchOf) -> Settings:
    """The settings in one flat dictionary, all of them checked; ``stretch_of`` is for longrope."""
    block, kind, theta = found
    if kind not in (*NUMBERS, LONGROPE):
        raise InputError(
            f"{values.source}: rope type {shown(kind)} changes with the length and cannot be baked; "
            f"supported are {', '.join((*NUMBERS, LONGROPE))}"
        )
    if theta <= 1:
        raise (block if THETA in block.values else values).wrong(THETA, "above 1")
    if kind == LONGROPE:
        return {KIND: kind, THETA: theta} | _longrope(block, values, stretch_of)
    required, optional = NUMBERS[kind]
    settings = {KIND: kind, THETA: theta} | {key: block.number(key) for key in required}
    settings |= {key: block.number(key) for key in optional if block.has(key)}
    if kind == "yarn" and "truncate" in block.values:
        settings["truncate"] = block.switch("truncate")
    if kind in STRETCHED:
        settings[ORIGINAL] = _original(block, values)
    if kind == "llama3" and settings["low_freq_factor"] == settings["high_freq_factor"]:
        raise block.wrong("low_freq_factor", "another number than high_freq_factor")
    return settings


def _original(block: ConfigValues, values: ConfigValues) -> int:
    """The length before stretching, which transformers 5 reads first from outside the block, 4.57 never."""
    limit = _limit(values)
    inside: int = block.whole(ORIGINAL, 0, 1) if block.has(ORIGINAL) else limit
    outside: int = values.whole(ORIGINAL, 0, 1) if values.has(ORIGINAL) else inside
    if inside != outside:
        raise InputError(
            f"{values.source}: {block.path}{ORIGINAL} is {inside}, which transformers 4 takes, and {ORIGINAL} is "
            f"{outside}, which transformers 5 takes; keep the one that the adapter was trained with"
        )
    return inside


def _longrope(block: ConfigValues, values: ConfigValues, stretch_of: StretchOf) -> Settings:
    """The settings of rope type longrope, with the attention factor that a release computes where it is not given.

    Raises:
        InputError: factors that change with the length, or lists that do not have one for each frequency.
    """
    count = Dimensions.from_config(values.values, values.source).num_frequencies
    short, long = ([float(number) for number in block.numbers(key, count)] for key in (SHORT, LONG))
    if short != long:
        raise InputError(
            f"{values.source}: {block.path}{SHORT} and {block.path}{LONG} differ, so that rope type {LONGROPE!r} "
            "changes with the length and cannot be baked; only equal lists can"
        )
    if block.has(ATTENTION):
        attention = float(block.number(ATTENTION))
    else:
        factor, original = stretch_of(block, values)
        if original < 2:
            raise block.wrong(ATTENTION, "given where positions are stretched from a length of 1")
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    # With equal lists the length before stretching only matters for the attention factor.
    return {SHORT: short, LONG: long, ATTENTION: attention, FACTOR: 1.0, ORIGINAL: _limit(values)}


def _stretch_of_5(block: ConfigValues, values: ConfigValues) -> tuple[float, int]:
    """By how much transformers 5 takes positions to be stretched, and from which length."""
    place = values if values.has(ORIGINAL) else block
    original = place.whole(ORIGINAL, 0, 1) if place.has(ORIGINAL) else _limit(values)
    return block.number(FACTOR) if block.has(FACTOR) else _limit(values) / original, original


def _stretch_of_4(block: ConfigValues, values: ConfigValues) -> tuple[float, int]:
    """The same of transformers 4.57, which reads the length only outside the block, and needs it or the factor."""
    if values.has(ORIGINAL):
        original = values.whole(ORIGINAL, 0, 1)
        return _limit(values) / original, original
    if not block.has(FACTOR):
        raise block.wrong(FACTOR, f"a number above 0 where there is no {ATTENTION}")
    return block.number(FACTOR), _limit(values)


def _limit(values: ConfigValues) -> int:
    """The number of positions that the model has."""
    family = values.text("model_type").removeprefix(MODEL_TYPE_PREFIX)
    limit: int = values.whole("max_position_embeddings", DEFAULTS[family]["max_position_embeddings"], 1)
    return limit


def _place(values: ConfigValues) -> str:
    """The key of the block that transformers 5 reads."""
    return SCALING if values.block(SCALING).values else PARAMETERS


def _text(settings: Settings, other: Settings) -> str:
    """The settings in which the releases differ."""
    different = [key for key in sorted({*settings, *other}) if settings.get(key) != other.get(key)]
    return ", ".join(f"{key} {shown(settings[key]) if key in settings else 'none'}" for key in different)
