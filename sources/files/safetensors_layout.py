"""The layout of safetensors files: the file of each tensor, the header of each file, and the index of all files."""

import json
from collections.abc import Mapping

from pos2d.dtypes import ITEM_BYTES, RANKS
from pos2d.sources.files.tensor_places import TensorPlace
from pos2d.units import parse_size


def layout_order(name: str, dtype: str) -> tuple[int, int, str]:
    """Sort key of a tensor within its file, as the safetensors library orders them: wide dtypes first, then by name."""
    return -ITEM_BYTES[dtype], RANKS[dtype], name


def lay_out(file: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorPlace]]:
    """The header of ``file`` and the place of every tensor in it, byte for byte as the safetensors library writes them.

    ``tensors`` maps names to dtype and shape. The header is padded to eight bytes; the places are in file order.
    """
    order = sorted(tensors, key=lambda name: layout_order(name, tensors[name][0]))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        starts[name] = end
        end += TensorPlace(file, shape, dtype).nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {name: TensorPlace(file, tensors[name][1], tensors[name][0], len(header) + starts[name]) for name in order}
    return header, places


def index_of(places: Mapping[str, TensorPlace]) -> dict[str, object]:
    """Content of the index file that names the shard of every tensor."""
    return {
        "metadata": {"total_size": sum(place.nbytes for place in places.values())},
        "weight_map": {name: place.file for name, place in places.items()},
    }


def split(sizes: Mapping[str, int], max_shard_size: str) -> dict[str, list[str]]:
    """File name to names of tensors: shards of at most ``max_shard_size``, filled in the order of ``sizes`` (bytes).

    Raises:
        UsageError: a size that cannot be read.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    shards = split_state_dict_into_shards_factory(
        dict(sizes),  # the factory only needs the size of a tensor, so sizes stand in for tensors
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
    )
    return shards.filename_to_tensors
