"""Manifests of older releases: those that can be read are brought up to date, the others are refused with a cure.

Each upgrade takes the JSON of one format version to the next one. This is the only place that knows older formats.
"""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from pos2d.config_values import shown
from pos2d.errors import InputError

Block = dict[str, Any]


def upgraded(block: Mapping[str, Any], version: int) -> Block:
    """The JSON of a manifest in format ``version``, from this or an older format.

    Raises:
        InputError: a newer format, none at all, or an older one whose artifact has to be made again.
    """
    found = block.get("format_version")
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= version:
        raise InputError(
            f"manifest: format version {shown(found)} is not {version}; install the release that made the artifact"
        )
    current = dict(block)
    while current["format_version"] < version:
        upgrade = UPGRADES.get(current["format_version"])
        newer = upgrade(current) if upgrade is not None else None
        if newer is None:
            raise InputError(
                f"manifest: format version {found} is of an older release and cannot be read; make the artifact again "
                f"with: {command_for(current)}"
            )
        current = newer | {"format_version": current["format_version"] + 1}
    return current


def command_for(block: Mapping[str, Any]) -> str:
    """The command that makes the artifact of a manifest again, as far as the manifest says it."""
    kind, base = block.get("kind"), block.get("base") or {}
    quant = (block.get("quant") or block.get("graph_quant") or {}).get("name")
    verb = ["merge"]
    if kind in ("onnx", "bnb"):
        verb = ["export", "--format", kind, *(["--quant", quant] if quant else [])]
    weights = ["--base-model", base.get("name", "BASE")]
    weights += ["--revision", base["revision"]] if base.get("revision") else []
    for adapter in block.get("adapters") or [block.get("adapter") or {}]:
        weights += ["--lora", _adapter_text(adapter)]
    rope = block.get("rope_2d") or {}
    indices = ",".join(map(str, rope.get("pair_indices", ())))
    positions = ["--pair-indices", indices] if indices else ["--no-patch-rope"]
    positions += ["--branch-stride", str(rope.get("branch_stride", 128)), "--align-to", rope.get("align_to", "left")]
    return shlex.join(["pos2d", *verb, *weights, *positions, "-o", "OUT"])


def _adapter_text(adapter: Mapping[str, Any]) -> str:
    """An adapter as ``--lora`` takes it: its file, and its weight if that is not 1."""
    weight = adapter.get("weight", 1)
    return str(adapter.get("file", "ADAPTER")) + ("" if weight == 1 else f"={weight}")


def _from_3(block: Block) -> Block | None:
    """Format 4 has three graphs in an ONNX artifact, where format 3 had one, and names how graphs are quantised."""
    return None if block.get("kind") == "onnx" else block | {"graph_quant": None}


def _from_4(block: Block) -> Block:
    """Format 5 says whether a quantised graph was calibrated; until then none was."""
    recipe = block.get("graph_quant")
    return block | {"graph_quant": recipe and {**recipe, "calibrated": False}}


def _from_5(block: Block) -> Block:
    """Format 6 has artifacts with one branch of what was trained; until then there were none."""
    return block | {"one_branch_of": None}


UPGRADES: Mapping[int, Callable[[Block], Block | None]] = {3: _from_3, 4: _from_4, 5: _from_5}
