"""The KV cache of a prefix of later sequences: a shared context, or the turns of a conversation."""

from collections.abc import Sequence

from pos2d.layout import build_layout
from pos2d.runtime.engine.backend import Backend, KVArrays
from pos2d.runtime.engine.common_prefix import common_length
from pos2d.runtime.engine.decode import prefill
from pos2d.runtime.engine.sequence import check_length
from pos2d.spec import Rope2DSpec


class PrefixCache:
    """``ids`` are the tokens whose keys and values ``cache`` holds from slot 0 on.

    After an interrupted forward pass the cache may hold further slots; the next call drops them. ``prefilled_tokens``
    counts all tokens that were ever prefilled into this cache.
    """

    def __init__(self, backend: Backend, spec: Rope2DSpec, context_length: int) -> None:
        self._backend, self._spec, self._context_length = backend, spec, context_length
        self.cache = backend.new_cache(0)
        self.ids: list[int] = []
        self.prefilled_tokens = 0

    def keep_common(self, ids: Sequence[int]) -> int:
        """Drop everything after the longest common prefix with ``ids``; return the length of that prefix."""
        common = common_length(self.ids, ids)
        self.cache.rewind(common)
        self.ids = self.ids[:common]
        return common

    def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold exactly ``ids``; only tokens that it does not hold yet are prefilled.

        Raises:
            InputError: ``ids`` take more positions than the model has.
        """
        if not ids:
            self.keep_common(ids)
            return
        layout = build_layout([ids], self._spec)
        check_length(layout, self._context_length)
        start = self.keep_common(ids)
        if start < len(ids):
            self.cache.reserve(len(ids))
            prefill(self._backend, layout, self.cache, start)
            self.record(ids, start)

    def fill_anew(self, ids: Sequence[int]) -> None:
        """Make the cache hold exactly ``ids``, all of which are prefilled; raises as :meth:`fill`."""
        self.keep_common(())
        self.fill(ids)

    def put(self, ids: Sequence[int], arrays: KVArrays) -> None:
        """Make the cache hold exactly ``ids``, whose keys and values ``arrays`` are."""
        self.keep_common(())
        self.cache.reserve(len(ids))
        self.cache.put(arrays)
        self.ids = list(ids)

    def record(self, ids: Sequence[int], start: int) -> None:
        """Note that the cache now holds ``ids``, of which the tokens from ``start`` on were prefilled."""
        self.ids = list(ids)
        self.prefilled_tokens += len(ids) - start
