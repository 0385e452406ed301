"""Checks of what an earlier run left: whether it is intact, and whether it is what this run would make."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.exporter.artifact.staging import discard_workspace
from pos2d.exporter.merging.ledger import TensorEntry, read_ledger
from pos2d.exporter.merging.shards import Shard, ShardLayout
from pos2d.hashing import sha256
from pos2d.manifest import Manifest, read_manifest
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.files.tensor_io import PIECE_BYTES, opened, pieces, sha256_of
from pos2d.sources.tensors.tensor_plan import PlannedTensor


def is_intact(shard: Shard, entries: Mapping[str, TensorEntry], directory: Path) -> bool:
    """Whether a written shard has, byte for byte, the contents that its ledger ``entries`` record."""
    path = directory / shard.file
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    if set(entries) != {tensor.name for tensor in shard.tensors}:
        return False
    with path.open("rb") as stream:
        if stream.read(len(shard.header)) != shard.header:
            return False
        for tensor in shard.tensors:
            digest = hashlib.sha256()
            for _, count in pieces(tensor.nbytes, PIECE_BYTES):
                digest.update(stream.read(count))
            if digest.hexdigest() != entries[tensor.name].sha256_out:
                return False
    return True


def finished_artifact(
    output: Path, recipe: Mapping[str, Any], base: Checkpoint, layout: ShardLayout, small_files: Mapping[str, str]
) -> Manifest | None:
    """The manifest of ``output`` if that is complete, has the same recipe and was made from the same weights.

    ``small_files``: the SHA-256 of every file that this run would write besides weights and card, by name. A run
    may be killed after its last step but before it could report; its leftover workspace is then removed.
    """
    try:
        manifest = read_manifest(output)
        ledger = read_ledger(manifest)
    except InputError:
        return None
    made = manifest.to_dict()
    if json.loads(json.dumps({key: made[key] for key in recipe})) != json.loads(json.dumps(recipe)):
        return None
    hashed = {name: facts["sha256"] for name, facts in manifest.checked_files.items() if "sha256" in facts}
    if hashed != small_files or not _is_complete(output, hashed, layout, ledger):
        return None
    if not is_made_from(base.directory, layout.tensors, ledger):
        return None
    discard_workspace(output)
    return manifest


def _is_complete(
    output: Path, hashed: Mapping[str, str], layout: ShardLayout, ledger: Mapping[str, TensorEntry]
) -> bool:
    return all(sha256(output / name) == digest for name, digest in hashed.items()) and all(
        is_intact(shard, {t.name: ledger[t.name] for t in shard.tensors if t.name in ledger}, output)
        for shard in layout.shards
    )


def is_made_from(base: Path, tensors: Sequence[PlannedTensor], ledger: Mapping[str, TensorEntry]) -> bool:
    """Whether the base's tensors have the hashes that a ledger recorded for them."""
    with opened(base, {tensor.source.file for tensor in tensors}) as files:
        return all(
            t.name in ledger and ledger[t.name].sha256_in == sha256_of(files[t.source.file], t.origin, t.source)
            for t in tensors
        )
