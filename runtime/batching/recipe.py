"""What identifies a run: everything that the bytes of its output depend on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pos2d import __version__
from pos2d.hashing import sha256
from pos2d.manifest import FILE_NAME
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.runtime.text.options import RequestOptions
from pos2d.sources.checkpoints.weight_files import CONFIG

# Files of an artifact, besides its manifest, that determine how a prompt is encoded.
ENCODING_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*")
TEMPLATE_FILES = "additional_chat_templates/*.jinja"


def recipe_of(
    opened: OpenedModel, source: Path, options: RequestOptions, loading: LoadOptions, context: str | None
) -> dict[str, Any]:
    """Everything that the output depends on; equal recipes give equal bytes on the same machine."""
    layout = {name: value for name, value in asdict(options.layout).items() if value is not None}
    prompts: dict[str, Any] = {"ignore_chat_template": True} if options.ignore_chat_template else {}
    if context is not None:
        prompts["context"] = context
    if options.chat_template_kwargs:
        prompts["chat_template_kwargs"] = dict(options.chat_template_kwargs)
    # A plain model has no manifest, which has the hashes of all weights, the configuration and the end tokens.
    plain: dict[str, Any] = {}
    if opened.source is not None:
        plain = {
            "weights": opened.source.base.stamps(),
            "config": sha256(opened.place / CONFIG),
            "end_tokens": opened.manifest.eos_token_ids,
        }
    recipe = {
        "input": {"name": source.name, "sha256": sha256(source)},
        "artifact": {"name": opened.place.name, "sha256": file_hashes(opened), **plain},
        "sampling": asdict(options.sampling),
        "options": {**asdict(loading), **layout, **prompts},
        "tool_version": __version__,
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(recipe))  # tuples become lists, as in the note of an earlier run
    return as_stored


def file_hashes(opened: OpenedModel) -> dict[str, str]:
    """SHA-256 of the manifest, and of the files that determine how a prompt is encoded."""
    patterns = (FILE_NAME, *ENCODING_FILES, TEMPLATE_FILES)
    hashed = sorted(path for pattern in patterns for path in opened.directory.glob(pattern))
    return {path.name: sha256(path) for path in hashed}


def model_facts(opened: OpenedModel) -> dict[str, Any]:
    """What is equal for copies of one model on several machines: hashes, and the sizes of the weights of a plain model.

    The manifest of an artifact has the hashes of its weights.
    """
    facts: dict[str, Any] = {"sha256": file_hashes(opened)}
    if opened.source is not None:
        sizes = {file: stamp[0] for file, stamp in opened.source.base.stamps().items()}
        facts |= {"weights": sizes, "config": sha256(opened.place / CONFIG)}
    return facts
