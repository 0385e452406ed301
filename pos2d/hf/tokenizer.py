"""The tokenizer of a base model or an artifact, as transformers' ``AutoTokenizer`` makes it. This file does not travel.

``AutoTokenizer`` itself imports torch, which an ONNX artifact does not need, and asks whether it may run an artifact's
model code. The class that it takes follows from a few names, so only that class is loaded.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.families import MODEL_TYPE_PREFIX
from pos2d.manifest import FILE_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
VOCABULARIES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json")
MODEL_KIND = re.compile(rb'"model"\s*:\s*\{\s*"type"\s*:\s*"(\w+)"')
# The class that reads tokenizer.json as it stands, in both releases; transformers 5 also has another name for it.
AS_STORED = "PreTrainedTokenizerFast"


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in ``directory``, with the token ids that ``AutoTokenizer`` gives for the base.

    Raises:
        InputError: there is no vocabulary, or a file that transformers cannot read.
    """
    # Without any of these files transformers 5 makes a tokenizer with an empty vocabulary.
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise InputError(
            f"{directory} has no {TOKENIZER_FILE}; put the base model's tokenizer files there, or work with token ids"
        )
    import transformers

    as_stored = transformers.PreTrainedTokenizerFast
    kind = getattr(transformers, class_name(directory), None)
    if not (isinstance(kind, type) and issubclass(kind, as_stored) and _can_read(kind, directory)):
        kind = as_stored
    reason = ""
    for chosen in dict.fromkeys((kind, as_stored)):
        try:
            tokenizer: PreTrainedTokenizerFast = chosen.from_pretrained(directory)
            return tokenizer
        except Exception as error:  # a damaged file may raise anything
            reason = first_line(error)
    cure = "copy the model again"
    if not (directory / TOKENIZER_FILE).is_file():
        cure = f"put a {TOKENIZER_FILE} there, as AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
    raise InputError(f"the tokenizer in {directory} cannot be read: {reason}; {cure}")


def first_line(error: Exception) -> str:
    """What a library says about a tokenizer, without backticks: in our messages, these mark parameters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).replace("`", "'")


def class_name(directory: Path) -> str:
    """Name of the class that ``AutoTokenizer`` takes for the tokenizer in ``directory``."""
    import transformers

    config, settings = _read(directory / "config.json"), _read(directory / "tokenizer_config.json")
    family = str(config.get("model_type") or _read(directory / FILE_NAME).get("family"))
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    declared = declared.removesuffix("Fast") if isinstance(declared, str) else None
    family = family.removeprefix(MODEL_TYPE_PREFIX)
    if transformers.PreTrainedTokenizerFast.__name__ == AS_STORED:
        return _class_name_4(declared, family)
    return _class_name_5(declared, family, directory)


def _class_name_4(declared: str | None, family: str) -> str:
    registered = {"llama": "LlamaTokenizer", "mistral": "LlamaTokenizer"}.get(family, "Qwen2Tokenizer")
    return f"{declared or registered}Fast"


def _class_name_5(declared: str | None, family: str, directory: Path) -> str:
    if family == "mistral":
        return AS_STORED
    if family == "qwen2" or (family == "qwen3" and declared is None):
        return "Qwen2Tokenizer"
    # Llama 3's tokenizer is byte-level, and the class with this name would make it one of sentencepiece.
    path = directory / TOKENIZER_FILE
    if declared == "LlamaTokenizer" and path.is_file() and b'"ByteLevel"' in path.read_bytes():
        return AS_STORED
    return declared or AS_STORED


def _can_read(kind: Any, directory: Path) -> bool:
    """Whether a class has the kind of vocabulary that ``tokenizer.json`` has; another one would be misread."""
    model = getattr(kind, "model", None)  # None in transformers 4, whose classes read the file as it stands
    path = directory / TOKENIZER_FILE
    stored = MODEL_KIND.search(path.read_bytes()) if model is not None and path.is_file() else None
    return stored is None or stored[1].decode() == model.__name__


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; an empty one if there is none, since loading reports damaged files."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
