"""Facts of the manifest that every ONNX graph repeats in its own metadata.

A graph alone so says how it is fed, and a manifest that was edited or belongs to other graphs is noticed.
"""

import json
from collections.abc import Mapping
from typing import Any

# Fields of the manifest; each is stored as JSON under ``pos2d.NAME``.
REPEATED = ("family", "vocab_size", "context_length", "eos_token_ids", "rope_2d")


def graph_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a graph, by key; ``facts`` are fields of :meth:`pos2d.manifest.Manifest.to_dict`."""
    return {f"pos2d.{name}": json.dumps(facts[name], sort_keys=True) for name in REPEATED}


def differing(stated: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """What ``found``, the metadata of a graph, says otherwise than ``stated``, fields of a manifest.

    One text for every field, with both values; of ``rope_2d`` only what differs in it. Fields that the graph does not
    have are left out: graphs of older releases have none.
    """
    differences = []
    for name, value in stated.items():
        text = found.get(f"pos2d.{name}")
        if text is not None and text != json.dumps(value, sort_keys=True):
            differences += differing_keys(name, value, json.loads(text))
    return differences


def differing_keys(name: str, stated: Any, found: Any) -> list[str]:
    """The keys of two blocks that have other values, or ``name`` itself where these are no blocks."""
    if not (isinstance(stated, Mapping) and isinstance(found, Mapping)):
        return [f"{name} {_short(found)}, not {_short(stated)}"]
    keys = sorted(key for key in {*stated, *found} if stated.get(key) != found.get(key))
    return [f"{key} {_short(found.get(key))}, not {_short(stated.get(key))}" for key in keys]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
