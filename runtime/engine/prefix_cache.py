"""Ordinary text that stays in a cache, for everything that goes on from it: branches, or more text."""

from collections.abc import Sequence
from itertools import takewhile

from pos2d.layout import build_layout
from pos2d.runtime.engine.backend import Backend
from pos2d.runtime.engine.decode import read_prompts
from pos2d.runtime.engine.sequence import check_length
from pos2d.spec import Rope2DSpec


class Prefix:
    """``ids`` are the tokens whose keys and values ``cache`` holds; after an interruption it may hold more, which the
    next call forgets. ``tokens_read`` counts what was ever encoded here."""

    def __init__(self, backend: Backend, spec: Rope2DSpec, context_length: int) -> None:
        self._backend, self._spec, self._context_length = backend, spec, context_length
        self.cache = backend.new_cache(0)
        self.ids: list[int] = []
        self.tokens_read = 0

    def keep(self, ids: Sequence[int]) -> int:
        """Forget everything from the first token on in which ``ids`` differ; returns how many are left."""
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))
        self.cache.rewind(shared)
        self.ids = self.ids[:shared]
        return shared

    def become(self, ids: Sequence[int]) -> None:
        """Hold exactly ``ids``; only what is not there yet is read.

        Raises:
            InputError: more positions than the model has.
        """
        if not ids:
            self.keep(ids)
            return
        layout = build_layout([ids], self._spec)
        check_length(layout, self._context_length)
        start = self.keep(ids)
        if start < len(ids):
            self.cache.reserve(len(ids))
            read_prompts(self._backend, layout, self.cache, start)
            self.went_on(ids, start)

    def went_on(self, ids: Sequence[int], start: int) -> None:
        """``ids`` are cached now; those from ``start`` on were encoded for it."""
        self.ids = list(ids)
        self.tokens_read += len(ids) - start
