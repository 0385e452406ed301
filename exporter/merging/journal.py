"""The journal of a merge: which shards are finished, rewritten whenever one is safely on the disk."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import OutputError
from pos2d.exporter.artifact.staging import sync
from pos2d.exporter.merging.ledger import TensorEntry
from pos2d.sources.files.json_object import write_json

FinishedShards = Mapping[str, Mapping[str, TensorEntry]]


@dataclass(frozen=True, slots=True)
class Journal:
    """``recipe`` describes the merge; only a merge with an equal recipe may resume from the journal."""

    path: Path
    recipe: Mapping[str, Any]

    def read(self) -> FinishedShards:
        """File name to the ledger of its tensors, for every shard that is complete.

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
            raise OutputError(f"{self.path} cannot be read ({error}); start over with `force=True`") from None
        ours = json.loads(json.dumps(self.recipe))
        differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if differing:
            raise OutputError(
                f"{self.path.parent} belongs to another merge, which differs in {', '.join(differing)}; `resume=True` "
                "needs the same inputs, `force=True` starts over"
            )
        return finished

    def write(self, shards: FinishedShards) -> None:
        """Record ``shards``, which must be on the disk already; the old journal is replaced in one step."""
        content = {
            "recipe": self.recipe,
            "shards": {f: {name: entry.to_dict() for name, entry in entries.items()} for f, entries in shards.items()},
        }
        new = self.path.with_suffix(".new")
        write_json(new, content)
        sync(new)
        os.replace(new, self.path)
        sync(self.path.parent)
