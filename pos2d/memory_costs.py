"""Memory that loading and running an artifact takes, in bytes, as far as both the planner and the loaders need it.

``exporter/planning/footprint.py`` adds up everything else.
"""

from collections.abc import Mapping

from pos2d.bnb_format import BnbQuant
from pos2d.dtypes import ITEM_BYTES
from pos2d.errors import StorageError
from pos2d.families import Dimensions
from pos2d.manifest import MERGES, Kind
from pos2d.units import size_text

# Tokens of one step of chunked prefill. Graphs take smaller chunks: what a chunk cannot attend to is not even computed.
TORCH_PREFILL_CHUNK = 512
GRAPH_PREFILL_CHUNK = 128

# Resident memory of a process after its imports and with an empty model, measured on Linux (CPU builds: torch 2.13,
# transformers 5.23, onnxruntime-gpu 1.31). torch alone is 230 MB of it.
PROCESS_BYTES: Mapping[Kind, int] = {
    "merged": 370_000_000,
    "stock": 370_000_000,
    "bnb": 370_000_000,
    "onnx": 79_000_000,
    "genai": 79_000_000,
}


def kv_cache_bytes(sizes: Dimensions, positions: int, dtype: str) -> int:
    """Bytes of the keys and values of ``positions`` tokens; branches are parts of one sequence and share it."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * positions * ITEM_BYTES[dtype]


def least_memory(kind: Kind, stored_bytes: int, stored_dtype: str, dtype: str, quant: BnbQuant | None = None) -> int:
    """Return the memory that an artifact needs on the CPU before its first token: the process and the weights.

    This is for loaders, which know the size and dtype of the files but not the model's dimensions. The weights of a
    merge are converted from ``stored_dtype`` to ``dtype``, or quantised while they are loaded; other kinds are loaded
    as stored, as is a stock checkpoint that is quantised.
    """
    if kind not in MERGES:
        return PROCESS_BYTES[kind] + stored_bytes
    half_bytes = {None: 2 * ITEM_BYTES[dtype], "8bit": 2, "nf4": 1}[quant]
    return PROCESS_BYTES[kind] + stored_bytes * half_bytes // (2 * ITEM_BYTES[stored_dtype])


def check_memory_fits(model: str, needed: int, available: int) -> None:
    """Check that ``model``, named as in the message, fits in the available memory.

    Raises:
        StorageError: ``needed`` is more than ``available``.
    """
    if needed > available:
        raise StorageError(
            f"{model} needs {size_text(needed)} of memory, {size_text(available)} are available; close other programs "
            "or take a smaller format, which `pos2d plan` finds"
        )
