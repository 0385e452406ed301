"""A loaded model, as everything that works with texts takes it."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.layout import Ints
from pos2d.manifest import Manifest
from pos2d.runtime.engine.backend import Backend
from pos2d.runtime.opening.opened_model import TemporaryFolder
from pos2d.runtime.text.json_schema import JsonSchemas


@dataclass(frozen=True, eq=False)
class LoadedArtifact:
    """The directory with a model's small files, its manifest, its decoder and its tokenizer.

    ``temporary``: the directory, if it is to be removed with the model. ``weights_stamp`` identifies the weights of a
    plain model, whose manifest has no hashes of them.
    """

    path: Path
    manifest: Manifest = field(repr=False)
    backend: Backend = field(repr=False)
    temporary: TemporaryFolder | None = field(default=None, repr=False)
    weights_stamp: str | None = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The artifact's tokenizer, loaded on first use: work with token ids needs none."""
        return load_tokenizer(self.path)

    @cached_property
    def json_schemas(self) -> JsonSchemas:
        """Compiles the schemas of answers for the tokenizer."""
        return JsonSchemas(self.tokenizer)

    @cached_property
    def identity(self) -> str:
        """A SHA-256 that is equal for equal models: of the manifest, which has the hashes of all files."""
        facts = [self.manifest.to_dict(), self.weights_stamp]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def check_ids(self, ids: Ints) -> None:
        """Check token ids of any shape.

        Raises:
            InputError: there are none, or some are outside the model's vocabulary.
        """
        if ids.size == 0:
            raise InputError("the input has no tokens")
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            raise InputError(
                f"token ids {ids.min()} to {ids.max()} are outside the vocabulary of {self.manifest.vocab_size}"
            )
