"""``genai_config.json``: the model, the names of the graph's inputs, and how onnxruntime-genai searches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pos2d.config_values import is_count, is_number, shown
from pos2d.errors import InputError
from pos2d.onnx_io import (
    ATTENTION_MASK,
    CACHE_PARTS,
    INPUT_IDS,
    LOGITS,
    PAST_PREFIX,
    POSITION_IDS,
    PRESENT_PREFIX,
)
from pos2d.sources.sidecars.sidecars import GENERATION_SETTINGS, read_settings
from pos2d.sources.source import Source

GENAI_CONFIG = "genai_config.json"
# As in our own sessions: products are cut into more blocks than there are threads, so that all finish together.
SESSION_OPTIONS: Mapping[str, Any] = {"provider_options": [], "session.dynamic_block_base": "4"}
# Keys of generation_config.json that have a place in the configuration, with the value that transformers takes where
# the file has none.
COUNTS: Mapping[str, int] = {
    "top_k": 50,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}
NUMBERS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0}


def genai_config(source: Source, directory: Path, graph: str) -> dict[str, Any]:
    """The configuration of an artifact of ``source`` whose generation settings are in ``directory``.

    ``graph`` is the name of the graph's file.

    Raises:
        InputError: a generation setting of another type.
    """
    sizes = source.base.sizes
    path = directory / GENERATION_SETTINGS
    settings = read_settings(path) if path.is_file() else {}
    decoder = {
        "filename": graph,
        "head_size": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "session_options": SESSION_OPTIONS,
        "inputs": {name: name for name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)}
        | _cache_names("past", PAST_PREFIX),
        "outputs": {LOGITS: LOGITS} | _cache_names("present", PRESENT_PREFIX),
    }
    bos, pad = (_token(key, settings, source) for key in ("bos_token_id", "pad_token_id"))
    model: dict[str, Any] = {
        "type": sizes.family,
        "context_length": sizes.context_length,
        "vocab_size": sizes.vocab,
        "eos_token_id": list(source.eos_token_ids),
        "pad_token_id": source.eos_token_ids[0] if pad is None else pad,
        "decoder": decoder,
    }
    model |= {} if bos is None else {"bos_token_id": bos}
    return {"model": model, "search": _search(settings, path, sizes.context_length)}


def _cache_names(side: str, prefix: str) -> dict[str, str]:
    return {f"{side}_{part}_names": f"{prefix}%d.{part}" for part in CACHE_PARTS}


def _token(key: str, settings: Mapping[str, Any], source: Source) -> int | None:
    """A special token, from the generation settings or the model's configuration; None for an id that no token has."""
    tokens = (values.get(key) for values in (settings, source.base.config))
    return next((int(t) for t in tokens if t is not None and is_count(t) and t < source.base.sizes.vocab), None)


def _search(settings: Mapping[str, Any], path: Path, context_length: int) -> dict[str, Any]:
    """The section ``search``, from the generation settings at ``path``."""
    found = {name: value for name, value in settings.items() if value is not None}
    if "max_new_tokens" in found:  # it has precedence, but onnxruntime-genai counts prompt and answer
        found.pop("max_length", None)
    counts = {name: found.get(name, default) for name, default in {**COUNTS, "max_length": context_length}.items()}
    numbers = {name: found.get(name, default) for name, default in NUMBERS.items()}
    sampled = found.get("do_sample", False)
    wrong = [f"{name} {shown(value)} must be a whole number" for name, value in counts.items() if not is_count(value)]
    wrong += [f"{name} {shown(value)} must be a number" for name, value in numbers.items() if not is_number(value)]
    wrong += [] if isinstance(sampled, bool) else [f"do_sample {shown(sampled)} must be true or false"]
    if wrong:
        raise InputError(f"{path}: {wrong[0]}; correct it")
    counts["max_length"] = min(counts["max_length"], context_length)
    # One buffer of max_length tokens is the cache before and after every pass, so that nothing is copied.
    return counts | numbers | {"do_sample": sampled, "past_present_share_buffer": True}
