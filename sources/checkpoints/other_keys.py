"""The keys of a configuration that change nothing here, but that transformers checks when it loads a torch artifact."""

from collections.abc import Mapping
from typing import Any

from pos2d.config_values import ConfigValues, is_count, is_number, shown
from pos2d.errors import InputError

# For training, and read as floats.
SHARES = ("initializer_range", "attention_dropout")
TOKENS = ("bos_token_id", "pad_token_id")
# Of classifiers, of other architectures, or about one run: a decoder's artifact has none of them.
LEFT_OUT = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "pruned_heads",
    "per_layer_config",
    "attn_implementation",
    "experts_implementation",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "name_or_path",
    "torchscript",
)


def other_keys(config: Mapping[str, Any], source: str, vocab: int) -> dict[str, Any]:
    """These keys, as far as ``config`` has them, in the types that every release of transformers takes.

    Raises:
        InputError: a value of another type, or a token outside the vocabulary, which transformers cannot load either.
    """
    values = ConfigValues(config, source)
    found: dict[str, Any] = {}
    for key in filter(config.__contains__, SHARES):
        value = config[key]
        if not (is_number(value) and 0 <= value <= 1):
            raise values.wrong(key, "a number from 0 to 1")
        found[key] = float(value)
    if "use_cache" in config:
        found["use_cache"] = values.switch("use_cache")
    if values.has("pretraining_tp"):
        found["pretraining_tp"] = values.whole("pretraining_tp")
    for key in filter(values.has, TOKENS):
        token = config[key]
        # Some models have -1 for none.
        if token != -1 and not (is_count(token) and token < vocab):
            raise values.wrong(key, f"a token id below {vocab}, or null")
        found[key] = token
    return found


def token_ids(stored: Any, source: str) -> list[int]:
    """The tokens of ``eos_token_id``: none, one or several.

    Raises:
        InputError: values that are not token ids; ``source`` names the file.
    """
    tokens = [] if stored is None else stored if isinstance(stored, list) else [stored]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise InputError(f"{source}: eos_token_id is {shown(stored)}, not token ids; correct it there")
    return tokens
