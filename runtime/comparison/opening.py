"""Opens the artifacts that are compared; what other engines run is refused with the name of that engine."""

import json
from collections.abc import Mapping
from pathlib import Path

from pos2d.errors import InputError, UsageError
from pos2d.manifest import FILE_NAME
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.text_files import read_text

# Kinds of artifacts that other engines run, and the engines.
ENGINES: Mapping[str, str] = {"gguf": "llama.cpp", "genai": "onnxruntime-genai"}


def open_artifact(artifact: str | Path) -> OpenedModel:
    """Open an artifact or a plain model without loading its weights.

    Raises:
        UsageError: it is of a kind that another engine runs.
        InputError: see :func:`pos2d.runtime.opening.opened_model.open_model`.
    """
    kind = _foreign_kind(Path(artifact))
    if kind is not None:
        raise UsageError(
            f"{artifact} is of kind {kind}, which {ENGINES[kind]} runs and `pos2d compare` cannot; compare the "
            "artifact that it was made from, or an export to ONNX"
        )
    try:
        return open_model(artifact)
    except InputError as error:
        if (Path(artifact) / "adapter_config.json").is_file() and not (Path(artifact) / "config.json").is_file():
            raise InputError(f"{artifact} is an adapter; give it as `lora`, and what was merged as artifact") from None
        raise error


def _foreign_kind(path: Path) -> str | None:
    """The kind of an artifact that other engines run; its manifest says it, or else its files."""
    if path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        return None
    try:
        kind = json.loads(read_text(path / FILE_NAME)).get("kind")
    except (OSError, ValueError, AttributeError, InputError):
        kind = None
    if isinstance(kind, str):
        return kind if kind in ENGINES else None
    if (path / "genai_config.json").is_file():
        return "genai"
    return "gguf" if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")) else None
