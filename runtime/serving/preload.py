"""Reads a document into the KV cache before the first request, so that no request over it waits for that."""

from pathlib import Path

from pos2d.errors import InputError
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.serving.engine import Engine
from pos2d.runtime.text.context_store import ContextStore
from pos2d.runtime.text.requests import encode_for


def preload(engine: Engine, context: str, cache_context: str | None) -> int:
    """Keep the keys and values of ``context``, as long as the engine lives; return its number of tokens.

    The text is the system message where the model has a chat template. With ``cache_context`` its keys and values come
    from there, or are written there.

    Raises:
        InputError: it does not fit, or a file that belongs to something else.
        UsageError, StorageError: as :meth:`pos2d.runtime.text.context_store.ContextStore.fill`.
    """
    artifact = engine.artifact
    encoded = encode_for(artifact.tokenizer, ["-"], context, artifact.manifest.rope_2d, ignore_chat_template=False)
    ids = encoded.whole_context or encoded.context or []
    if 2 * len(ids) > engine.kv_budget:
        raise InputError(
            f"the context has {len(ids)} tokens, and the KV cache must hold twice as many; it holds "
            f"{engine.kv_budget}: shorten the context, or give `kv_cache_memory` more"
        )
    prefix = PrefixCache(artifact.backend, artifact.manifest.rope_2d, artifact.manifest.context_length)
    if cache_context is None:
        prefix.fill(ids)
    else:
        ContextStore(artifact, Path(cache_context)).fill(prefix, ids)
    engine.keep(ids, prefix.cache.take(len(ids)))
    return len(ids)
