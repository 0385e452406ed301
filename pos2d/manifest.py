"""The manifest of an artifact, ``manifest.json``.

It is written last and read first, and what an artifact is never follows from the names of its files.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal, get_args

from pos2d.config_values import MAX_COUNT
from pos2d.dtypes import TORCH_NAMES
from pos2d.errors import InputError
from pos2d.families import CLASS_NAMES
from pos2d.git_lfs import refuse_pointer
from pos2d.manifest_upgrades import upgraded
from pos2d.onnx_io import GraphInfo
from pos2d.recipes import BnbRecipe, GgufQuant, GgufRecipe, GraphRecipe, weight_recipe
from pos2d.spec import Rope2DSpec
from pos2d.text_files import read_text

Kind = Literal["merged", "stock", "bnb", "onnx", "gguf", "genai"]
# The kinds that ``merge`` writes, with weights in floating point; a stock checkpoint may also be quantised.
MERGES = ("merged", "stock")
# The kinds that are ONNX graphs.
GRAPH_KINDS = ("onnx", "genai")
# What runs the kinds that are for other programs alone, and how.
PROGRAMS: Mapping[Kind, str] = {
    "gguf": "llama.cpp and the programs that are built on it run: `llama-server -m FILE.gguf`, or "
    "`ollama create NAME -f Modelfile`",
}

FORMAT_VERSION = 6
# The types of values that no class checks; a list is a tuple until the manifest is written.
VALUE_TYPES: Mapping[str, tuple[type, ...]] = {
    "family": (str,),
    "dtype": (str,),
    "vocab_size": (int,),
    "context_length": (int,),
    "eos_token_ids": (list, tuple),
    "base": (dict,),
    "adapters": (list, tuple),
    "options": (dict,),
    "files": (dict,),
    "tool_version": (str,),
    "ledger": (dict, NoneType),
    "graph": (dict, NoneType),
    "one_branch_of": (dict, NoneType),
    "parity": (dict, NoneType),
}
FILE_NAME = "manifest.json"
# The model card, which nothing reads and its owner may edit or leave out.
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One artifact. ``context_length`` is in positions; generation ends at ``eos_token_ids``.

    ``files`` maps a name to bytes and sha256; the weights of a merge have a sha256 for each tensor, in the ledger.
    ``rope_2d``: the positions that the artifact has. ``one_branch_of``: those of the training, where the artifact has
    one branch of them and is an ordinary model otherwise.
    ``base``, ``adapters``: where the weights came from; ``options``: how they were summed and rounded.
    ``quant``, ``graph_quant``: how the weights of a torch artifact or GGUF file, or of an ONNX artifact, are quantised.
    ``ledger``: totals and tensors of a merge, totals of a quantisation.
    ``graph``: dimensions, files, inputs and outputs of an ONNX artifact.
    ``parity``: the results of the check at the end of the export, unless it was skipped.
    """

    kind: Kind
    family: str
    dtype: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    rope_2d: Rope2DSpec
    base: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    tool_version: str
    one_branch_of: Rope2DSpec | None = None
    quant: BnbRecipe | GgufRecipe | None = None
    graph_quant: GraphRecipe | None = None
    ledger: Mapping[str, Any] | None = None
    graph: GraphInfo | None = None
    parity: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def checked_files(self) -> Mapping[str, Mapping[str, Any]]:
        """The files that must be as they were written: all but the card."""
        return {name: facts for name, facts in self.files.items() if name != CARD}

    @property
    def recipe(self) -> BnbRecipe | GgufRecipe | GraphRecipe | None:
        """How the weights are quantised, whatever the kind."""
        return self.quant or self.graph_quant

    @property
    def made_from(self) -> str:
        """The names of the base and of its adapters."""
        return sum_of_names(self.base, self.adapters)

    @property
    def has_branches(self) -> bool:
        """Whether one sequence may have several branches; the graph for onnxruntime-genai takes no mask."""
        return self.kind != "genai"

    @property
    def total_bytes(self) -> int:
        return sum(facts["bytes"] for facts in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "rope_2d": self.rope_2d.to_dict(),
            "one_branch_of": self.one_branch_of.to_dict() if self.one_branch_of is not None else None,
            "quant": self.quant.to_dict() if self.quant is not None else None,
            "graph_quant": self.graph_quant.to_dict() if self.graph_quant is not None else None,
        }

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "Manifest":
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: a format that cannot be read, an unknown kind, keys that are missing or unknown, or a graph
                whose file is not listed.
        """
        block = upgraded(block, FORMAT_VERSION)
        known = {field.name for field in fields(cls)}
        if set(block) != known:
            raise InputError(f"manifest: keys {sorted(set(block) ^ known)} are missing or unknown")
        if block["kind"] not in get_args(Kind):
            raise InputError(f"manifest: kind {block['kind']!r} is not one of {', '.join(get_args(Kind))}")
        _check_types(block)
        manifest = cls(
            **{
                **block,
                "rope_2d": Rope2DSpec.from_dict(block["rope_2d"]),
                "one_branch_of": Rope2DSpec.from_dict(block["one_branch_of"]) if block["one_branch_of"] else None,
                "quant": weight_recipe(block["quant"]) if block["quant"] is not None else None,
                "graph_quant": GraphRecipe.from_dict(block["graph_quant"]) if block["graph_quant"] else None,
                "graph": GraphInfo.from_dict(block["graph"]) if block["graph"] is not None else None,
                "eos_token_ids": tuple(block["eos_token_ids"]),
                "adapters": tuple(block["adapters"]),
            }
        )
        if manifest.graph is not None:
            unlisted = sorted(manifest.graph.files - set(manifest.files))
            if unlisted:
                raise InputError(f"manifest: graph names {unlisted[0]}, which files lacks; make the artifact again")
        return manifest

    def write(self, directory: Path) -> None:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def sum_of_names(base: Mapping[str, Any], adapters: Iterable[Mapping[str, Any]]) -> str:
    """``base + adapter``: the names in a manifest's fields ``base`` and ``adapters``."""
    return " + ".join([base["name"], *(adapter["file"] for adapter in adapters)])


def _check_types(block: Mapping[str, Any]) -> None:
    """Check the values that no class checks.

    Raises:
        InputError: a value of another type, or a graph for another kind of artifact than ONNX.
    """
    wrong = [name for name, types in VALUE_TYPES.items() if type(block[name]) not in types]
    if not wrong:
        ledger = block["ledger"] or {}
        is_valid = {
            "family": block["family"] in CLASS_NAMES,
            "dtype": block["dtype"] in TORCH_NAMES.values(),
            "vocab_size": 0 < block["vocab_size"] <= MAX_COUNT,
            "context_length": 0 < block["context_length"] <= MAX_COUNT,
            "eos_token_ids": all(type(token) is int for token in block["eos_token_ids"]),
            "base": all(type(block["base"].get(key)) in (str, NoneType) for key in ("name", "revision")),
            "adapters": all(type(adapter) is dict for adapter in block["adapters"]),
            "files": all(_is_file(name, facts) for name, facts in block["files"].items()),
            "ledger": all(type(ledger.get(key, {})) is dict for key in ("totals", "tensors"))
            and all(type(entry) is dict for entry in ledger.get("tensors", {}).values()),
            "graph": (block["graph"] is not None) == (block["kind"] in GRAPH_KINDS),
            "quant": (type(block["quant"]) is dict and block["quant"].get("name") in get_args(GgufQuant))
            <= (block["kind"] == "gguf"),
        }
        wrong = [name for name, valid in is_valid.items() if not valid]
    if wrong:
        raise InputError(f"manifest: {', '.join(wrong)} cannot be read; make the artifact again")


def _is_file(name: str, facts: object) -> bool:
    """Whether a file of an artifact is described by its size, and lies within the artifact."""
    path = PurePosixPath(name)
    is_within = bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
    if type(facts) is not dict or not is_within or type(facts.get("sha256", "")) is not str:
        return False
    return type(facts.get("bytes")) is int and facts["bytes"] >= 0


def is_artifact(path: str | Path) -> bool:
    """Whether a manifest is at ``path``; an empty text is no path, and not the current directory."""
    return bool(str(path)) and (Path(path) / FILE_NAME).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an artifact, and check that all files but its card exist with the sizes that it states.

    Raises:
        InputError: a missing directory, a missing or broken manifest, files that are missing or have another size, or
            Git LFS pointers in their place.
    """
    path = directory / FILE_NAME
    if not directory.exists():
        raise InputError(f"{directory} does not exist; give the directory of an artifact")
    if not path.is_file():
        raise InputError(f"{directory} is not an artifact of this tool (it has no {FILE_NAME}); {_cure(directory)}")
    refuse_pointer(path)
    try:
        block = json.loads(read_text(path))
        if not isinstance(block, dict):
            raise InputError("the manifest is not a JSON object; make the artifact again")
        if not {"format_version", "kind"} & set(block):
            raise InputError("another program wrote this file; move it away, and the directory is a plain model")
        manifest = Manifest.from_dict(block)
    except (ValueError, TypeError, AttributeError, OverflowError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); make the artifact again") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for name, facts in manifest.checked_files.items():
        refuse_pointer(directory / name)
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size != facts["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes, the manifest says {facts['bytes']}"
            raise InputError(f"{directory / name} {state}; copy the artifact again, or make it again")
    return manifest


def _cure(path: Path) -> str:
    """What to do instead, by what is at ``path``."""
    if path.suffix == ".pth" or (path / "adapter_config.json").is_file():
        return "it is an adapter: merge it with its base, and give the output"
    if path.is_file():
        return "it is a file: give the directory of an artifact"
    return "make one with `pos2d merge` or `pos2d export`"
