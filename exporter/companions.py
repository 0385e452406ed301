"""Files that travel with the weights: tokenizer, chat template, generation settings."""

import json
import shutil
from pathlib import Path

from exporter.staging import write_json

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# What transformers 5 calls the class that both generations know by the other name.
NEW_TOKENIZER_CLASS, TOKENIZER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def copy_companions(source: Path, target: Path) -> None:
    """Copy what ``source`` has of them, in a form that transformers 4.57 reads as well."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == NEW_TOKENIZER_CLASS:
            write_json(path, settings | {"tokenizer_class": TOKENIZER_CLASS})
