"""Sampling options, presets, and the order in which options, presets and an artifact's settings apply."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pos2d.errors import InputError, UsageError
from pos2d.options import check_option, check_options, option, options_of, split_options, texts
from pos2d.runtime.engine.generation_settings import (
    NO_SETTINGS,
    OPTION_KEYS,
    SAMPLING_KEYS,
    STOP_KEY,
    GenerationSettings,
    read_settings,
    read_stop,
    unused_warning,
)
from pos2d.text_files import read_text

Preset = Literal["factual", "creative", "code", "chat", "translate"]
# The middle of the ranges that the trainer's inference guide recommends.
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "factual": {"temperature": 0.2, "top_p": 0.75, "top_k": 25, "repetition_penalty": 1.1},
    "creative": {"temperature": 0.8, "top_p": 0.92, "top_k": 75, "repetition_penalty": 1.0},
    "code": {"temperature": 0.15, "top_p": 0.8, "top_k": 30, "repetition_penalty": 1.1},
    "chat": {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
    "translate": {"temperature": 0.1, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0},
}
GENERATION_CONFIG = "generation_config.json"
# Transformers' defaults for a configuration with do_sample.
DO_SAMPLE_DEFAULTS = {"temperature": 1.0, "top_k": 50}
# Options that greedy decoding does not use, and the values at which they ask for nothing else.
NARROWING: Mapping[str, tuple[float, ...]] = {"top_k": (0, 1), "top_p": (1,), "min_p": (0,)}
PENALTY_NAMES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
DEFAULT_MAX_NEW_TOKENS = 256
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100
MAX_BIAS = 100
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
# Sizes that no model and no random number generator takes.
TOO_MANY_TOKENS, TOO_LARGE_SEED = 2**32, 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of one branch are chosen, and where the branch ends.

    Every branch has its own stream of random numbers. Stop strings are cut from the answer. A log probability is the
    natural logarithm of the probability that the model itself gives a token, before any option changes it.

    Raises:
        UsageError: a value of another type or out of range.
    """

    max_new_tokens: int = option(
        DEFAULT_MAX_NEW_TOKENS,
        "Maximum number of new tokens for each prompt.",
        minimum=1,
        default_text="the artifact's, else 256",
        flags=("-n",),
    )
    min_new_tokens: int = option(
        0,
        "Minimum number of new tokens before an end-of-sequence token is allowed.",
        minimum=0,
        default_text="the artifact's, else 0",
    )
    temperature: float = option(
        0.0, "Sampling temperature; 0 is greedy.", default_text="the artifact's, else 0", flags=("--temp",)
    )
    top_k: int = option(
        0,
        "Sample only from the k most likely tokens; 0 means all tokens.",
        minimum=0,
        default_text="the artifact's, else 0",
    )
    top_p: float = option(
        1.0,
        "Sample only from the smallest set of most likely tokens whose probabilities add up to this.",
        default_text="the artifact's, else 1",
    )
    min_p: float = option(
        0.0,
        "Drop tokens whose probability is below this fraction of the most likely token's.",
        minimum=0,
        maximum=1,
        default_text="the artifact's, else 0",
    )
    repetition_penalty: float = option(
        1.0,
        "Above 1: tokens of the context, the prompt and the answer become less likely.",
        minimum=0.01,
        maximum=100,
        default_text="the artifact's, else 1",
    )
    frequency_penalty: float = option(
        0.0,
        "Subtract this from the logit of a token for every time that the answer has it already.",
        minimum=-2,
        maximum=2,
    )
    presence_penalty: float = option(
        0.0, "Subtract this once from the logit of every token that the answer has already.", minimum=-2, maximum=2
    )
    logit_bias: Mapping[Any, Any] | None = option(
        None,
        'Numbers from -100 to 100 that are added to the logits of tokens, by token id, such as {"198": -100}.',
        metavar="JSON|@FILE",
        default_text="none",
    )
    json_schema: Mapping[str, Any] | None = option(
        None,
        'Write nothing but JSON that fits this JSON schema, such as {"type": "object"} for any object.',
        metavar="JSON|@FILE",
        default_text="none",
    )
    stop: tuple[str, ...] = option(
        (),
        "End the answer before this text, or at this special token. Repeat the option for several texts.",
        metavar="TEXT",
        escapes=True,
    )
    end_token: tuple[str, ...] = option(
        (),
        "Token that ends the answer, in addition to the artifact's, such as <|eot_id|>. Repeat the option for several.",
        metavar="TOKEN",
    )
    seed: int = option(0, "Random seed for sampling.", minimum=0)
    logprobs: bool = option(False, "Add the log probability of every token to the JSON output.")
    top_logprobs: int = option(
        0,
        "Add the log probabilities of this many most likely tokens at every place, and that of the token itself.",
        minimum=0,
        maximum=20,
    )
    generation: GenerationSettings = field(default=NO_SETTINGS)  # the artifact's, where no option has them

    def __post_init__(self) -> None:
        check_options(self)
        for name, fits, rule in (
            ("max_new_tokens", self.max_new_tokens < TOO_MANY_TOKENS, "is more than any model generates"),
            (
                "min_new_tokens",
                self.min_new_tokens <= self.max_new_tokens,
                f"must be at most `max_new_tokens` ({self.max_new_tokens})",
            ),
            (
                "temperature",
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
                f"must be 0 (greedy) or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}",
            ),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1 (all tokens)"),
            ("seed", self.seed < TOO_LARGE_SEED, "must fit in 64 bits"),
        ):
            if not fits:
                raise UsageError(f"`{name}` {getattr(self, name)} {rule}")
        token_biases(self.logit_bias)
        if not all(self.stop):
            raise UsageError("`stop` has an empty text, which would end every answer at once; leave it out")

    def summary(self) -> str:
        """The options that are not at their defaults, in words."""
        named = [f"temperature {self.temperature:g}, seed {self.seed}" if self.temperature else "greedy"]
        for name in (*(NARROWING if self.temperature else ()), *PENALTY_NAMES):
            if getattr(self, name) != options_of(Sampling)[name].default:
                named.append(f"{name} {getattr(self, name):g}")
        named += [name for name in ("logit_bias", "json_schema") if getattr(self, name) is not None]
        return ", ".join([*named, *self.generation.names()])

    def warnings(self, directory: Path) -> list[str]:
        """What the generation settings of the artifact in ``directory`` ask for and is not done."""
        return unused_warning(self.generation, str(directory / GENERATION_CONFIG))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(Sampling):
    """The options that a caller may give: those of :class:`Sampling`, and a preset that stands below them."""

    preset: Preset | None = option(
        None, "Set of sampling options for a purpose. Options that are given take precedence.", default_text="none"
    )


def resolve_sampling(
    directory: Path, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Sampling:
    """The sampling options in force: ``options`` override their preset, which overrides ``defaults``.

    ``options`` may hold options of other groups too. ``defaults`` are the generation settings of the artifact in
    ``directory`` unless given.

    Raises:
        UsageError: a value out of range, an unknown preset, or options that greedy decoding does not use.
        InputError: generation settings that cannot be read.
    """
    (given,) = split_options(options, SamplingOptions)
    preset: Preset | None = given.pop("preset", None)
    declared = options_of(SamplingOptions)
    check_option(declared["preset"], preset)
    given = {name: texts(value) if declared[name].kind is tuple else value for name, value in given.items()}
    values = {
        **(generation_defaults(directory) if defaults is None else defaults),
        **(PRESETS[preset] if preset else {}),
        **given,
    }
    limit = given.get("max_new_tokens")
    if "min_new_tokens" not in given and isinstance(limit, int):  # a short limit overrides a default minimum
        values["min_new_tokens"] = min(values.get("min_new_tokens", 0), max(0, limit))
    values["generation"] = _overridden(values.get("generation", NO_SETTINGS), given)
    sampling = Sampling(**values)
    unused = [f"`{name}`" for name, off in NARROWING.items() if name in given and given[name] not in off]
    if unused and sampling.temperature == 0.0:
        raise UsageError(
            f"greedy decoding (temperature 0) does not use {', '.join(unused)}; give a `temperature` above 0"
        )
    return sampling


def token_biases(logit_bias: Mapping[Any, Any] | None) -> dict[int, float]:
    """The biases of ``logit_bias`` by token id; the keys may be texts, as JSON writes them.

    Raises:
        UsageError: a key that is no token id, or a bias that is no number or out of range.
    """
    biases: dict[int, float] = {}
    for key, bias in (logit_bias or {}).items():
        text = key if isinstance(key, str) else str(key) if type(key) is int else ""
        if not TOKEN_ID.fullmatch(text) or int(text) in biases:
            raise UsageError(f"`logit_bias` has the key {key!r}, which is not the id of a token, or is there twice")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise UsageError(f"`logit_bias` of token {text} is {bias!r}; it must be a number from -100 to 100")
        biases[int(text)] = float(bias)
    return biases


def values_of(sampling: Sampling) -> dict[str, Any]:
    """The values of ``sampling``, as :func:`resolve_sampling` takes them for ``defaults``."""
    return {f.name: getattr(sampling, f.name) for f in fields(Sampling)}


def _overridden(settings: GenerationSettings, given: Mapping[str, Any]) -> GenerationSettings:
    """``settings`` without the lengths that ``given`` options replace, as those of ``generate`` do."""
    if "max_new_tokens" in given:
        settings = replace(settings, max_length=None)
    if "min_new_tokens" in given:
        settings = replace(settings, min_length=0)
    return settings


def generation_defaults(directory: Path) -> dict[str, Any]:
    """The options that ``generation_config.json`` sets.

    As in transformers, decoding is greedy unless the file has ``do_sample``.

    Raises:
        InputError: not a JSON object, or a value that is not allowed.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_text(path))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        defaults = _defaults(config)
        Sampling(**defaults)
    except (ValueError, RecursionError, OSError, InputError, UsageError) as error:
        reason = str(error).replace("`", "")  # these are keys of the file, not parameters of a function
        raise InputError(
            f"{path} cannot be used: {reason}; correct it in the base, and make the artifact again"
        ) from None
    return defaults


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a configuration sets, and its other settings as ``generation``.

    Raises:
        ValueError: a value of another type or out of range.
    """
    settings = read_settings(config)
    values = {name: config[name] for name in OPTION_KEYS if config.get(name) is not None}
    if config.get("do_sample"):
        values = DO_SAMPLE_DEFAULTS | values
    else:
        values = {name: value for name, value in values.items() if name not in SAMPLING_KEYS}
    if config.get(STOP_KEY) is not None:
        values["stop"] = read_stop(config[STOP_KEY])
    if settings.max_length is not None:  # the prompt has at least one of its tokens
        values["max_new_tokens"] = max(1, settings.max_length - 1)
    limit, least = values.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS), values.get("min_new_tokens")
    if isinstance(limit, int) and isinstance(least, int) and limit > 0:
        values["min_new_tokens"] = min(least, limit)
    return values if settings == NO_SETTINGS else values | {"generation": settings}
