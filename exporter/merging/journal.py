"""What an interrupted merge has finished: rewritten as a whole whenever a shard is safely on the disk."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import OutputError
from pos2d.exporter.artifact.staging import sync, write_json
from pos2d.exporter.merging.ledger import TensorEntry

Shards = Mapping[str, Mapping[str, TensorEntry]]


@dataclass(frozen=True, slots=True)
class Journal:
    """``recipe`` says what is being made; only a run that makes the same may go on from here."""

    path: Path
    recipe: Mapping[str, Any]

    def read(self) -> Shards:
        """File name to the ledger of its tensors, for every shard that was written whole.

        Raises:
            OutputError: the journal belongs to another recipe, or cannot be read.
        """
        if not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            theirs, shards = dict(content["recipe"]), content["shards"]
            finished = {
                file: {name: TensorEntry.from_dict(entry) for name, entry in entries.items()}
                for file, entries in shards.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{self.path} cannot be read ({error}); start over with --force") from None
        ours = json.loads(json.dumps(self.recipe))
        other = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if other:
            raise OutputError(
                f"{self.path.parent} belongs to another merge, which differs in {', '.join(other)}; --resume needs the "
                "same inputs, --force starts over"
            )
        return finished

    def write(self, shards: Shards) -> None:
        """Note ``shards``, which must be on the disk already; a reader sees the old journal or the new one."""
        content = {
            "recipe": self.recipe,
            "shards": {f: {name: entry.to_dict() for name, entry in entries.items()} for f, entries in shards.items()},
        }
        new = self.path.with_suffix(".new")
        write_json(new, content)
        sync(new)
        os.replace(new, self.path)
        sync(self.path.parent)
