"""The settings of ``generation_config.json``: which are used, as ``generate`` of transformers uses them, and which not.

Every key of transformers' ``GenerationConfig`` stands in exactly one of the tables below. Keys that have an option
(:class:`pos2d.runtime.engine.sampling.Sampling`) are its default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

# Keys that are options under the same name, and one that is an option under another.
OPTION_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
STOP_KEY = "stop_strings"
# Keys that only a configuration with do_sample uses; greedy decoding has no use for them.
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Keys that other places read: the end tokens stand in the manifest.
READ_ELSEWHERE = ("do_sample", "eos_token_id")
# Keys that do not change which tokens are generated: speed, memory, what `generate` returns, tokens that a prompt of
# text does not use, the parameters of beam search and of assistants, without which they have no effect.
WITHOUT_EFFECT = frozenset(
    {
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_legacy_cache",
        "prefill_chunk_size",
        "low_memory",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "renormalize_logits",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "speculation_type",
        "use_mtp",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
    }
)
# Keys that are not used, with the values beside null at which `generate` does not use them either.
UNUSED_KEYS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
    "remove_invalid_values": (False,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """The settings that no option has, each at its "off" value unless the file says otherwise.

    Names and meaning are transformers'. ``max_length`` and ``min_length`` count the tokens of context, prompt and
    answer. ``unused`` are the keys whose values ask for something that is not done here.
    """

    max_length: int | None = None
    min_length: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    unused: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The keys that are used and not "off"."""
        used = [f for f in fields(self) if f.name != "unused"]
        return [f.name for f in used if getattr(self, f.name) != f.default]


NO_SETTINGS = GenerationSettings()


def read_settings(config: Mapping[str, Any]) -> GenerationSettings:
    """The settings of a configuration.

    Raises:
        ValueError: a value of another type or out of range; the message names the key.
    """
    sampled = config.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise ValueError(f"do_sample {_shown(sampled)} must be true or false")
    values = {
        name: _read(name, config[name])
        for name in READERS
        if config.get(name) is not None and (sampled or name not in SAMPLING_KEYS)
    }
    if config.get("max_new_tokens") is not None:  # it has precedence
        values.pop("max_length", None)
    if config.get("min_new_tokens") is not None:
        values.pop("min_length", None)
    return GenerationSettings(**values, unused=tuple(_unused(config)))


def read_stop(value: Any) -> tuple[str, ...]:
    """The texts of ``stop_strings``.

    Raises:
        ValueError: neither a text nor a list of texts.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{STOP_KEY} {value!r} must be a text or a list of texts")
    return tuple(texts)


def unused_warning(settings: GenerationSettings, place: str) -> list[str]:
    """One sentence about the keys of ``place`` that are not used, or none."""
    if not settings.unused:
        return []
    keys = ", ".join(settings.unused)
    return [f"{place}: {keys} {'is' if len(settings.unused) == 1 else 'are'} not used"]


def _unused(config: Mapping[str, Any]) -> list[str]:
    known = {*OPTION_KEYS, STOP_KEY, *READERS, *READ_ELSEWHERE, *WITHOUT_EFFECT}
    return [
        f"{name} {_shown(value)}"
        for name, value in config.items()
        if name not in known and value is not None and value not in UNUSED_KEYS.get(name, ())
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _read(name: str, value: Any) -> Any:
    reader, rule = READERS[name]
    try:
        return reader(value)
    except (TypeError, ValueError, KeyError, IndexError):
        raise ValueError(f"{name} {_shown(value)} must be {rule}") from None


def _whole(value: Any, minimum: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise ValueError
    return float(value)


def _within(value: Any, low: float, high: float) -> float:
    if not low <= _number(value) <= high:
        raise ValueError
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(_whole(token) for token in value)


def _sequence(value: Any) -> tuple[int, ...]:
    ids = _ids(value)
    if not ids:
        raise ValueError
    return ids


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(_sequence(ids) for ids in value)


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    if not isinstance(value, list):
        raise ValueError
    pairs = [(_sequence(ids), _number(bias)) for ids, bias in value]
    return tuple(dict(pairs).items())


def _suppressed(value: Any) -> tuple[int, ...]:
    """Ids that are no token, such as Whisper's -1, suppress nothing."""
    if not isinstance(value, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) for token in value
    ):
        raise ValueError
    return tuple(token for token in value if token >= 0)


def _cutoff(value: Any) -> float:
    """A probability; 1 means none, as 0 does."""
    return _within(value, 0, 1) % 1


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _whole(start), _within(factor, 1e-3, 1e3)


_IDS = "a list of token ids"
_SHARE = "a number from 0 to 1"
# How each key is read, and what its value must be.
READERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "max_length": (lambda value: _whole(value, 1), "a whole number above 0"),
    "min_length": (_whole, "a whole number"),
    "sequence_bias": (_biases, "a list of pairs, each of a list of token ids and a number"),
    "encoder_repetition_penalty": (lambda value: _within(value, 0.01, 100), "a number from 0.01 to 100"),
    "no_repeat_ngram_size": (_whole, "a whole number"),
    "encoder_no_repeat_ngram_size": (_whole, "a whole number"),
    "bad_words_ids": (_sequences, "a list of lists of token ids"),
    "forced_bos_token_id": (_whole, "a token id"),
    "forced_eos_token_id": (
        lambda value: _sequence(value if isinstance(value, list) else [value]),
        "a token id or a list of token ids",
    ),
    "exponential_decay_length_penalty": (_decay, "a whole number and a factor from 0.001 to 1000"),
    "suppress_tokens": (_suppressed, _IDS),
    "begin_suppress_tokens": (_suppressed, _IDS),
    "top_h": (lambda value: _within(value, 1e-9, 1), "a number above 0 and at most 1"),
    "typical_p": (lambda value: _within(value, 1e-9, 1), "a number above 0 and at most 1"),
    "epsilon_cutoff": (_cutoff, _SHARE),
    "eta_cutoff": (_cutoff, _SHARE),
}
