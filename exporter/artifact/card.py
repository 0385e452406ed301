"""The model card of an artifact: what it is, what it was made from, how close it is to that, and how to run it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pos2d.exporter.artifact.card_usage import usage
from pos2d.exporter.artifact.figures import parity_text
from pos2d.hashing import sha256
from pos2d.manifest import CARD, Manifest
from pos2d.sources.source import Source
from pos2d.spec import Rope2DSpec, spans
from pos2d.units import size_text

ONE_BRANCH = """
## One branch only

This was made from a model with 2D RoPE, which answers several prompts as branches of one sequence: its rotary
frequencies {frequencies} of {count} encode branch and time. Here is **one branch** of it, as an ordinary {family}
model in which the frequencies of the branches never turn. For one prompt it computes what the trained model computes.
Several branches in one sequence need pos2d, and an artifact with 2D RoPE.
"""
# What a program that lists models groups this one under, by kind.
LIBRARIES = {"merged": "transformers", "bnb": "transformers", "stock": "transformers", "onnx": "pos2d"} | {
    "gguf": "llama.cpp",
    "genai": "onnxruntime-genai",
}
NAMES = {"onnx": "ONNX", "bnb": "bitsandbytes", "gguf": "GGUF", "genai": "onnxruntime-genai"}
LICENCE_KEYS = ("license", "license_name", "license_link")


def with_card(staging: Path, manifest: Manifest, source: Source) -> Manifest:
    """Write the card of an artifact that is complete and checked, and return its manifest with the card in it.

    Equal inputs give equal bytes. The manifest itself is not written.
    """
    manifest = replace(manifest, files=manifest.checked_files)  # a resumed merge may have left a card
    write_card(staging, manifest, licence_of(source.base.directory, source.base.config))
    facts = {"bytes": (staging / CARD).stat().st_size, "sha256": sha256(staging / CARD)}
    return replace(manifest, files={**manifest.files, CARD: facts})


def write_card(target: Path, manifest: Manifest, licence: Mapping[str, str]) -> None:
    """Write the card of ``manifest`` into ``target``; ``licence`` are the metadata that :func:`licence_of` returns."""
    from huggingface_hub import ModelCard, ModelCardData

    base = manifest.base
    on_hub = base["name"] if base["revision"] else None
    data = ModelCardData(
        base_model=on_hub,
        base_model_relation=_relation(manifest) if on_hub else None,
        library_name=LIBRARIES[manifest.kind],
        pipeline_tag="text-generation",
        tags=["pos2d", manifest.kind, *(["2d-rope"] if manifest.rope_2d.is_2d else [])],
    )
    for key, value in licence.items():
        data[key] = value
    parts = [f"# {_title(manifest)}\n\n", _contents(manifest), "\n\n| | |\n|---|---|\n"]
    parts += [f"| {label} | {text} |\n" for label, text in _facts(manifest)]
    trained = manifest.one_branch_of
    if trained is not None:
        frequencies, count = spans(sorted(trained.pair_indices)), trained.num_frequencies
        parts.append(ONE_BRANCH.format(frequencies=frequencies, count=count, family=manifest.family))
    parts += ["\n## How to run it\n", usage(manifest)]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{''.join(parts)}").save(target / CARD)


def licence_of(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The licence that the card of a base states, or else its configuration, as metadata of a card; empty for none."""
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard.load(directory / CARD, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, or one that is damaged in any way: then it says nothing
        stated = {}
    if not isinstance(stated.get("license"), str):
        stated = dict(config)
    found = {key: stated[key] for key in LICENCE_KEYS if isinstance(stated.get(key), str)}
    return found if "license" in found else {}


def _relation(manifest: Manifest) -> str | None:
    """How the Hub is to list this below its base: quantised weights of another model are a fine-tune, too."""
    if manifest.adapters:
        return "finetune"
    return "quantized" if manifest.recipe is not None else None


def _title(manifest: Manifest) -> str:
    form = [NAMES.get(manifest.kind, ""), "" if manifest.recipe is None else manifest.recipe.name]
    return ", ".join(filter(None, (manifest.made_from, " ".join(filter(None, form)))))


def _contents(manifest: Manifest) -> str:
    names = ", ".join(f"`{adapter['file']}`" for adapter in manifest.adapters)
    merged = f" with the LoRA adapter{'s' * (len(manifest.adapters) > 1)} {names} merged" if names else ""
    return (
        f"This is the model `{manifest.base['name']}`{merged}. pos2d {manifest.tool_version} wrote it, and "
        "`manifest.json` says what it was made from."
    )


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Labels and texts of the table."""
    yield "base", _base(manifest.base)
    for adapter in manifest.adapters:
        yield "adapter", _adapter(adapter)
    yield "positions", _positions(manifest.rope_2d, manifest.one_branch_of)
    yield "weights", _weights(manifest)
    yield "size", size_text(manifest.total_bytes)
    yield "context", f"{manifest.context_length} tokens"
    retention = (manifest.ledger or {}).get("totals", {}).get("retention")
    if retention is not None:
        lossy = "quantising" if manifest.recipe is not None else f"rounding to {manifest.dtype}"
        yield "retention", f"{retention:.1%} of what the adapter changes is left after {lossy}"
    if manifest.parity is not None:
        yield "checked", parity_text(manifest.parity)


def _base(base: Mapping[str, Any]) -> str:
    revision = f" at revision `{base['revision']}`" if base["revision"] else ""
    digest = base.get("config_sha256")
    return f"`{base['name']}`{revision}" + (f", SHA-256 of its configuration `{digest}`" if digest else "")


def _adapter(adapter: Mapping[str, Any]) -> str:
    ranks = sorted(adapter.get("ranks") or [])
    rank = "" if not ranks else f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    weight = "" if adapter.get("weight", 1) == 1 else f", weight {adapter['weight']:g}"
    return f"`{adapter['file']}`{rank}{weight}, SHA-256 `{adapter.get('sha256')}`"


def _positions(spec: Rope2DSpec, one_branch_of: Rope2DSpec | None) -> str:
    if not spec.is_2d:
        return "ordinary" if one_branch_of is None else "ordinary: one branch of a model with 2D RoPE"
    count, total = len(spec.pair_indices), spec.num_frequencies
    return (
        f"2D RoPE: rotary frequencies {spans(sorted(spec.pair_indices))} of {total} (ratio {count / total:g}) encode "
        f"branch and time; stride {spec.branch_stride}, align {spec.align_to}, {spec.visibility}"
    )


def _weights(manifest: Manifest) -> str:
    if manifest.quant is not None:
        form = "llama.cpp" if LIBRARIES[manifest.kind] == "llama.cpp" else "bitsandbytes"
        return f"quantised to {manifest.quant.name}, in the format of {form}; the others in {manifest.dtype}"
    graph = manifest.graph_quant
    if graph is None:
        return f"in {manifest.dtype}"
    counts = {bits: list(graph.bits.values()).count(bits) for bits in sorted(set(graph.bits.values()))}
    layers = " and ".join(f"{count} layers in {bits} bits" for bits, count in counts.items())
    calibrated = ", calibrated with GPTQ" if graph.calibrated else ""
    return f"{layers}, in blocks of {graph.block_size}{calibrated}; the others in {manifest.dtype}"
