"""``tokenizer_config.json`` in the form that transformers 4.57 and 5 both read, with the same tokens as a result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The class with which both releases take everything from tokenizer.json. It stands in for those that only one of the
# releases has, or that would run code.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Classes of decoders that both releases have, with or without "Fast" at the end.
KNOWN_CLASSES = {
    "CodeLlamaTokenizer", "CohereTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer",
    "Qwen2Tokenizer",
}  # fmt: skip
# Those to which 4.57 adds a first token unless the settings say no; 5 leaves that to tokenizer.json, and saves nothing.
ADDING_CLASSES = {"CodeLlamaTokenizer", "CohereTokenizer", "GemmaTokenizer", "LlamaTokenizer"}
# What each class but that one returns; a model of this kind takes no token types.
INPUT_NAMES = ["input_ids", "attention_mask"]
# What transformers 5 writes for itself, and the code of a class that is not used.
DROPPED = ("auto_map", "backend", "is_local", "local_files_only", "tokenizer_file")
# Places on the machine where a tokenizer was saved; nothing reads them, and artifacts get published.
PLACES = ("name_or_path", "special_tokens_map_file")
NAMED_TOKENS = {
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
}  # fmt: skip
EXTRA, OLD_EXTRA, NAMED_EXTRA = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"


def readable_settings(settings: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """The settings of a tokenizer, or its map of special tokens, as both releases read them.

    ``whole``: they stand beside a tokenizer.json, which has all of the tokenizer. The lists of further special tokens
    have one name in 4.57 and another in 5, which reads both; those with names of their own are an object in both.
    """
    result = {key: value for key, value in settings.items() if key not in PLACES}
    extra = result.pop(EXTRA, None)
    named = dict(extra) if isinstance(extra, dict) else {}
    listed = list(extra) if isinstance(extra, list) else []
    of_release_5 = result.pop(NAMED_EXTRA, None)
    named |= of_release_5 if isinstance(of_release_5, dict) else {}
    known = result.get(OLD_EXTRA)
    if listed or isinstance(known, list):
        # Release 5 cannot read a token that is an object there. Its flags are in tokenizer.json.
        result[OLD_EXTRA] = list(dict.fromkeys(map(_content, [*(known or []), *listed])))
    if whole:
        # Release 5 makes every such key a special token, 4.57 only those in the object.
        named |= {key: value for key, value in result.items() if _is_named_extra(key, value) and key not in named}
        for key in DROPPED:
            result.pop(key, None)
        if result.get("tokenizer_class") is not None and _class_of(result) not in KNOWN_CLASSES:
            result["tokenizer_class"] = TOKENIZER_CLASS
        result.setdefault("model_input_names", INPUT_NAMES)
    if named:
        result[EXTRA] = named
    return result


def settings_of_class(settings: Mapping[str, Any], tokenizer: Path, family: str) -> dict[str, Any]:
    """What must be added to readable settings, by the file ``tokenizer``, where the releases read a class differently.

    Release 5 does not use Llama's class for bytes, nor for a base of the family mistral, whose file it takes as it
    stands. 4.57 puts tokens first and last as its class does, 5 as the file.
    """
    if _class_of(settings) not in ADDING_CLASSES:
        return {}
    if _class_of(settings) == "LlamaTokenizer" and b'"ByteLevel"' in tokenizer.read_bytes():
        return {"tokenizer_class": TOKENIZER_CLASS}
    from tokenizers import Tokenizer

    try:
        reader = Tokenizer.from_file(str(tokenizer))
    except Exception:  # a damaged file is reported by whoever uses it
        return {}
    special = reader.encode("a").special_tokens_mask
    added = {"add_bos_token": special[:1] == [1], "add_eos_token": special[-1:] == [1]}
    if family == "mistral" and all(settings.get(key, value) == value for key, value in added.items()):
        return {"tokenizer_class": TOKENIZER_CLASS}
    return {} if set(added) & set(settings) else added


def _content(token: object) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)


def _class_of(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class")).removesuffix("Fast")


def _is_named_extra(key: str, value: object) -> bool:
    is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    return key.endswith("_token") and key not in NAMED_TOKENS and is_token
