"""Sampling options, presets, and the order in which options, presets and an artifact's settings apply."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pos2d.errors import InputError, UsageError
from pos2d.options import check_option, check_options, option, options_of, split_options, texts

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
# Keys of generation_config.json that are used; they have the names of our options.
CONFIG_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
# Transformers' defaults for a configuration with do_sample.
DO_SAMPLE_DEFAULTS = {"temperature": 1.0, "top_k": 50}
# Options that greedy decoding does not use.
NARROWING = ("top_k", "top_p", "min_p")
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100
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
        256,
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
    stop: tuple[str, ...] = option(
        (), "End the answer before this text. Repeat the option for several texts.", metavar="TEXT"
    )
    end_token: tuple[str, ...] = option(
        (),
        "Token that ends the answer, in addition to the artifact's, such as <|eot_id|>. Repeat the option for several.",
        metavar="TOKEN",
    )
    seed: int = option(0, "Random seed for sampling.", minimum=0)
    logprobs: bool = option(False, "Add the log probability of every token to the JSON output.")

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
            ("stop", all(self.stop), "has an empty text, which would end every answer at once"),
        ):
            if not fits:
                raise UsageError(f"`{name}` {getattr(self, name)} {rule}")

    def summary(self) -> str:
        """The options that are not at their defaults, in words."""
        named = [f"temperature {self.temperature:g}, seed {self.seed}" if self.temperature else "greedy"]
        for name in (*(NARROWING if self.temperature else ()), "repetition_penalty"):
            if getattr(self, name) != options_of(Sampling)[name].default:
                named.append(f"{name} {getattr(self, name):g}")
        return ", ".join(named)


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
    sampling = Sampling(**values)
    unused = [f"`{name}`" for name in NARROWING if name in given and sampling.temperature == 0.0]
    if unused:
        raise UsageError(
            f"greedy decoding (temperature 0) does not use {', '.join(unused)}; give a `temperature` above 0"
        )
    return sampling


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
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = {name: config[name] for name in CONFIG_KEYS if config.get(name) is not None}
        if config.get("do_sample"):
            settings = DO_SAMPLE_DEFAULTS | settings
        else:
            settings = {name: value for name, value in settings.items() if name not in ("temperature", *NARROWING)}
        Sampling(**settings)
    except (ValueError, TypeError, AttributeError, UsageError) as error:
        reason = str(error).replace("`", "")  # these are keys of the file, not parameters of a function
        raise InputError(
            f"{path} cannot be used: {reason}; correct it in the base, and make the artifact again"
        ) from None
    return settings
