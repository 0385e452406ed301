"""How answers are written: the options, the presets, and where their defaults come from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from pos2d.errors import InputError, UsageError

Preset = Literal["factual", "creative", "code", "chat", "translate"]
# The middle of what the trainer's inference guide recommends for each.
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "factual": {"temperature": 0.2, "top_p": 0.75, "top_k": 25, "repetition_penalty": 1.1},
    "creative": {"temperature": 0.8, "top_p": 0.92, "top_k": 75, "repetition_penalty": 1.0},
    "code": {"temperature": 0.15, "top_p": 0.8, "top_k": 30, "repetition_penalty": 1.1},
    "chat": {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
    "translate": {"temperature": 0.1, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0},
}
GENERATION_CONFIG = "generation_config.json"
FROM_CONFIG = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
# What transformers takes where a configuration that samples does not say it.
SAMPLED_DEFAULTS = {"temperature": 1.0, "top_k": 50}
NARROWING = ("top_k", "top_p", "min_p")
TEXTS = ("stop", "end_token")
WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "seed")
REAL = ("temperature", "top_p", "min_p", "repetition_penalty")


class SamplingFlags(TypedDict, total=False):
    """The fields of :class:`Sampling` as keywords, None where nothing is said, and a preset below them."""

    preset: Preset | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str]
    end_token: str | Sequence[str]
    seed: int | None
    logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one answer is written.

    Args:
        max_new_tokens: where it ends with ``length``.
        min_new_tokens: so many are written before an end token may be.
        temperature: 0 is greedy; above, a draw from ``softmax(logits / temperature)``.
        top_k: only so many of the likeliest tokens are drawn; 0 is all.
        top_p: only the fewest likeliest with this probability together; 1 is all.
        min_p: only tokens at least so many times as likely as the likeliest; 0 is all.
        repetition_penalty: above 1, tokens of the prompt, its context and the answer become less likely.
        stop: texts that end the answer; it is cut before them.
        end_token: tokens, as the tokenizer writes them, that end the answer as the artifact's own do.
        seed: of the draws. Every branch has its own stream of random numbers.
        logprobs: note the natural logarithm of every token's probability, as the model itself gives it.

    Raises:
        UsageError: a value out of range.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    end_token: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in (*WHOLE, *REAL):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name in WHOLE else int | float):
                raise UsageError(f"{name} {value!r} must be a {'whole number' if name in WHOLE else 'number'}")
        if not isinstance(self.logprobs, bool):
            raise UsageError(f"logprobs {self.logprobs!r} must be true or false")
        for name in TEXTS:
            if not isinstance(getattr(self, name), tuple) or not all(isinstance(t, str) for t in getattr(self, name)):
                raise UsageError(f"{name} {getattr(self, name)!r} must be texts")
        for name, fits, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("max_new_tokens", self.max_new_tokens < 2**32, "is more than any model writes"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "must be 0 to max_new_tokens"),
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature <= 100,
                "must be 0 (greedy) or 0.001 to 100",
            ),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or above"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1 (all tokens)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be 0 (all tokens) to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "must be 0.01 to 100; 1 is none"),
            ("seed", 0 <= self.seed < 2**64, "must be 0 or above, in 64 bits"),
            ("stop", all(self.stop), "has an empty text, which would end every answer at once"),
        ):
            if not fits:
                raise UsageError(f"{name} {getattr(self, name)} {rule}")

    def summary(self) -> str:
        """What is not as it would be if nobody had said anything."""
        drawn = f"temperature {self.temperature:g}, seed {self.seed}"
        named = ["greedy" if self.temperature == 0.0 else drawn]
        default = Sampling()
        for name in (*(NARROWING if self.temperature else ()), "repetition_penalty"):
            if getattr(self, name) != getattr(default, name):
                named.append(f"{name} {getattr(self, name):g}")
        return ", ".join(named)


def resolve_sampling(directory: Path, flags: SamplingFlags, below: Mapping[str, Any] | None = None) -> Sampling:
    """The options of an artifact's answers: flags win over the preset, it over ``below``, that over the artifact's own
    generation settings.

    Raises:
        UsageError: a value out of range, an unknown preset, or flags that narrow draws where nothing is drawn.
        InputError: generation settings that cannot be read.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ()) and name != "preset"}
    given |= {name: _texts(given[name]) for name in TEXTS if name in given}
    preset = flags.get("preset")
    if preset is not None and preset not in get_args(Preset):
        raise UsageError(f"preset {preset!r} is not one of {', '.join(get_args(Preset))}")
    lower = generation_defaults(directory) if below is None else below
    options = {**lower, **(PRESETS[preset] if preset else {}), **given}
    most = flags.get("max_new_tokens")
    if "min_new_tokens" not in given and isinstance(most, int):  # a shorter answer is wanted than the artifact's least
        options["min_new_tokens"] = min(options.get("min_new_tokens", 0), max(0, most))
    sampling = Sampling(**options)
    unheeded = [name for name in NARROWING if name in given and sampling.temperature == 0.0]
    if unheeded:
        raise UsageError(
            f"{', '.join(unheeded)}: nothing is drawn at temperature 0 (greedy); give a temperature above 0"
        )
    return sampling


def generation_defaults(directory: Path) -> dict[str, Any]:
    """What ``generation_config.json`` says, with transformers' meaning; greedy where it does not ask for samples.

    Raises:
        InputError: not a JSON object, or a value of another type.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        said = {name: settings[name] for name in FROM_CONFIG if settings.get(name) is not None}
        if settings.get("do_sample"):
            said = SAMPLED_DEFAULTS | said
        else:
            said = {name: value for name, value in said.items() if name not in ("temperature", *NARROWING)}
        Sampling(**said)
    except (ValueError, TypeError, AttributeError, UsageError) as error:
        raise InputError(
            f"{path} cannot be used: {error}; correct it in the base, and make the artifact again"
        ) from None
    return said


def _texts(value: Any) -> Any:
    """One text or a list of them, where several may stand, as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def preset_lines() -> list[str]:
    """The presets as a table for people."""
    names = list(next(iter(PRESETS.values())))
    head = f"{'preset':10}" + "".join(f"{name:>20}" for name in names)
    rows = [f"{preset:10}" + "".join(f"{values[name]:>20}" for name in names) for preset, values in PRESETS.items()]
    return [head, *rows]
