"""Whether the files of an artifact say the same about the model as its manifest."""

import json
from pathlib import Path

from pos2d.errors import InputError
from pos2d.families import Dimensions
from pos2d.graph_metadata import REPEATED, differing, differing_keys
from pos2d.manifest import FILE_NAME, PROGRAMS, Manifest


def check_settings(directory: Path, manifest: Manifest) -> None:
    """Compare the manifest with what graphs and ``config.json`` say of positions, sizes and end tokens.

    Raises:
        InputError: they disagree.
    """
    if manifest.kind in PROGRAMS:
        return  # the file of another program, whose hash is compared
    if manifest.graph is None:
        _check_config(directory, manifest)
        return
    import onnx

    block = manifest.to_dict()
    for graph in manifest.graph.graphs.values():
        model = onnx.load(directory / graph.file, load_external_data=False)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        faults = differing({name: block[name] for name in REPEATED}, metadata)
        for tensor in model.graph.initializer:
            if tensor.name == "rope_axes":
                axes = onnx.numpy_helper.to_array(tensor).tolist()
                faults += differing_keys("axes", {"axes": list(manifest.rope_2d.axes)}, {"axes": axes})
        _raise_for(faults, directory / graph.file, directory)


def _check_config(directory: Path, manifest: Manifest) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    sizes = Dimensions.from_config(config, str(path))
    stated = {name: getattr(manifest, name) for name in ("family", "context_length")}
    found = {name: getattr(sizes, name) for name in stated}
    faults = differing_keys("", stated | {"vocab_size": manifest.vocab_size}, found | {"vocab_size": sizes.vocab})
    if manifest.rope_2d.is_2d or "rope_2d" in config:  # without 2D RoPE the configuration is of the base's own classes
        faults += differing_keys("rope_2d", manifest.rope_2d.to_dict(), config.get("rope_2d"))
    _raise_for(faults, path, directory)


def _raise_for(faults: list[str], path: Path, directory: Path) -> None:
    if faults:
        raise InputError(f"{path} has {faults[0]} as {directory / FILE_NAME} says; make the artifact again")
