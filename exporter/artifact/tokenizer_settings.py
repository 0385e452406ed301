"""``tokenizer_config.json`` in the form that transformers 4.57 and 5 both read, with the same tokens as a result."""

from collections.abc import Mapping
from typing import Any

# Both releases take everything from tokenizer.json with this class; others rebuild parts of it, each in its own way.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# What each class but that one returns; a model of this kind takes no token types.
INPUT_NAMES = ["input_ids", "attention_mask"]
# What transformers 5 writes for itself, and the code of a class that is not used.
DROPPED = ("auto_map", "backend", "is_local", "local_files_only", "tokenizer_file")
NAMED_TOKENS = {
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
}  # fmt: skip
EXTRA, OLD_EXTRA, NAMED_EXTRA = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"


def readable_settings(settings: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """The settings of a tokenizer, or its map of special tokens, as both releases read them.

    ``whole``: they stand beside a tokenizer.json, which has all of the tokenizer. The lists of further special tokens
    have one name in 4.57 and another in 5, which reads both; those with names of their own are an object in both.
    """
    result = dict(settings)
    extra = result.pop(EXTRA, None)
    named = dict(extra) if isinstance(extra, dict) else {}
    listed = list(extra) if isinstance(extra, list) else []
    of_release_5 = result.pop(NAMED_EXTRA, None)
    named |= of_release_5 if isinstance(of_release_5, dict) else {}
    if listed:
        known = result.get(OLD_EXTRA) or []
        result[OLD_EXTRA] = [*known, *(token for token in listed if token not in known)]
    if whole:
        # Release 5 makes every such key a special token, 4.57 only those in the object.
        named |= {key: value for key, value in result.items() if _is_named_extra(key, value) and key not in named}
        for key in DROPPED:
            result.pop(key, None)
        result["tokenizer_class"] = TOKENIZER_CLASS
        result.setdefault("model_input_names", INPUT_NAMES)
    if named:
        result[EXTRA] = named
    return result


def _is_named_extra(key: str, value: object) -> bool:
    is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    return key.endswith("_token") and key not in NAMED_TOKENS and is_token
