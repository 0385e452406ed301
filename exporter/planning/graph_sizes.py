"""The sizes of a decoder, as its graphs were built from them."""

from pos2d.errors import InputError
from pos2d.families import Dimensions
from pos2d.manifest import Manifest


def graph_sizes(manifest: Manifest, source: str) -> Dimensions:
    """Of an ONNX artifact's manifest; ``source`` names it in errors.

    Raises:
        InputError: sizes that are missing or unknown.
    """
    try:
        return Dimensions(**(manifest.graph or {})["sizes"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{source} has no sizes that this tool knows ({error}); export it again") from None
