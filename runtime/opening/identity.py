"""What tells the weights of a plain model from others, without reading all of them."""

import hashlib
import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pos2d.sources.source import Source

# Pieces of every file that are hashed, spread evenly over it: two fine-tunes of one base may have equal sizes, and
# equal times where an archive set them.
PIECES, PIECE_BYTES = 256, 4096


def weights_stamp(source: "Source") -> str:
    """A hash of the base's configuration, of sizes and times of its files, and of pieces of their bytes.

    Adapters are not part of it: a manifest has their hashes.
    """
    base = source.base
    digest = hashlib.sha256(json.dumps([base.stamps(), base.config], sort_keys=True, default=str).encode())
    for name in base.files:
        with (base.directory / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for piece in range(PIECES):
                file.seek(piece * max(size - PIECE_BYTES, 0) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
