"""The Modelfile, from which Ollama makes a model of a GGUF file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pos2d.exporter.formats.gguf.chat import chat_texts
from pos2d.exporter.formats.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE_NAME = "Modelfile"
# Positions for which Ollama reserves memory at first; the whole context of a model may take many gigabytes.
USUAL_CONTEXT = 8192
# Ollama's parameters, and the keys of generation_config.json that say the same.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}
# What Ollama takes for a key that is not given, where that changes the answers of a greedy model.
NEUTRAL = {"repetition_penalty": 1.0}
QUOTES = '"""'


def modelfile(
    file: str,
    vocabulary: Vocabulary | None,
    tokenizer: "PreTrainedTokenizerFast | None",
    ends: tuple[int, ...],
    context_length: int,
    settings: Mapping[str, Any],
) -> str:
    """The content of a Modelfile for the GGUF ``file``; ``settings`` are those of ``generation_config.json``."""
    lines = [f"FROM ./{file}", ""]
    if vocabulary is not None and tokenizer is not None:
        lines += [*_template(vocabulary, tokenizer), ""]
        lines += [f"PARAMETER stop {_quoted(vocabulary.tokens[token])}" for token in ends]
    if context_length > USUAL_CONTEXT:
        lines.append(f"# The model has {context_length} positions; more of them take more memory.")
    lines.append(f"PARAMETER num_ctx {min(context_length, USUAL_CONTEXT)}")
    known = NEUTRAL | {key: value for key, value in settings.items() if _is_number(value)}
    lines += [f"PARAMETER {name} {known[key]:g}" for name, key in SAMPLING.items() if key in known]
    return "\n".join(lines) + "\n"


def _template(vocabulary: Vocabulary, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    texts, reason = chat_texts(tokenizer)
    if texts is None:
        return [f"# No TEMPLATE: {reason}. Ollama then takes one that it knows, or writes the prompt alone."]
    if vocabulary.first:
        texts = texts.without_first(vocabulary.tokens[vocabulary.ids["bos"]])
    template = texts.go_template
    if QUOTES in template:
        return [f"# No TEMPLATE: the chat template writes {QUOTES}, which ends a template in this file."]
    comment = [] if texts.system else ["# The chat template takes no system message, and one is left out."]
    return [*comment, f"TEMPLATE {QUOTES}{template}{QUOTES}"]


def _quoted(text: str) -> str:
    return f'"{text}"' if '"' not in text else f"{QUOTES}{text}{QUOTES}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
