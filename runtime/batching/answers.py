"""The records of a window of lines: lines with one prompt share sequences, over the same context; others do not."""

from collections.abc import Iterator, Sequence
from typing import Any

from pos2d.layout import build_layout
from pos2d.runtime.batching.lines import Line
from pos2d.runtime.engine.backend import KVCache
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.requests import Request, stream_events
from pos2d.runtime.text.text_decode import decode_text

# Prompt tokens of lines that share a sequence: beyond it, masking each other's tokens costs more than sharing saves.
SHARED_TOKENS = 2048


class Prefixes:
    """The KV cache of the context of the last group, which the next group may have as well."""

    def __init__(self) -> None:
        self._prefix: PrefixCache | None = None

    def filled(self, artifact: LoadedArtifact, context: Sequence[int]) -> KVCache:
        """A cache that holds exactly ``context``, alone and at the positions of an ordinary text."""
        if self._prefix is None:
            self._prefix = PrefixCache(artifact.backend, artifact.manifest.rope_2d, artifact.manifest.context_length)
        self._prefix.fill(context)
        cache: KVCache = self._prefix.cache
        return cache


def records_in_order(
    artifact: LoadedArtifact, lines: Sequence[Line], done: int, branches_per_sequence: int
) -> Iterator[list[dict[str, Any]]]:
    """Answer the lines of one window; yield the records after the first ``done`` of the file, in the order of lines.

    Groups that the file has whole are not decoded again.
    """
    prefixes = Prefixes()
    ready: dict[int, dict[str, Any]] = {}
    following = max(done + 1, lines[0].number)
    for group in _groups(lines, branches_per_sequence):
        if group[-1].number <= done:
            continue
        for line, completions in zip(group, _answers(artifact, group, prefixes), strict=True):
            ready[line.number] = _record(line, completions)
        records = []
        while following in ready:
            records.append(ready.pop(following))
            following += 1
        if records:
            yield records


def _groups(lines: Sequence[Line], size: int) -> list[list[Line]]:
    """Groups of lines that are decoded together, in the order of their last lines."""
    groups: list[list[Line]] = []
    shared: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        if line.shares is None:
            groups.append([line])
            continue
        group = shared.get(line.shares, [])
        if group and (len(group) == size or _prompt_tokens([*group, line]) > SHARED_TOKENS):
            groups.append(group)
            group = []
        shared[line.shares] = [*group, line]
    return sorted([*groups, *shared.values()], key=lambda group: group[-1].number)


def _prompt_tokens(lines: Sequence[Line]) -> int:
    return sum(len(request.encoded.branches[0]) for request in _requests(lines))


def _requests(lines: Sequence[Line]) -> list[Request]:
    return [line.request for line in lines if line.request is not None]


def _answers(artifact: LoadedArtifact, group: Sequence[Line], prefixes: Prefixes) -> list[list[Completion]]:
    """The completions of every line of a group; a record does not repeat the prompts, so they are left empty here."""
    requests = _requests(group)
    if not requests:
        return [[]]
    if group[0].shares is None:
        (request,) = requests
        return [collect(stream_events(artifact, request), [""] * len(request.encoded.branches))]
    events = _shared_events(artifact, requests, prefixes)
    return [[completion] for completion in collect(events, [""] * len(group))]


def _shared_events(artifact: LoadedArtifact, requests: Sequence[Request], prefixes: Prefixes) -> Iterator[Event]:
    """Decode single prompts as branches of one isolated sequence: each is answered as if it were alone."""
    prompts = [request.encoded.branches[0] for request in requests]
    context = requests[0].encoded.context or []
    spec = requests[0].spec if context else artifact.manifest.rope_2d
    layout = build_layout(prompts, spec, context or None, visibility="isolated")
    samplings = [request.sampling for request in requests]
    random_streams = [(0,)] * len(requests)  # as if each were the only prompt
    cache = prefixes.filled(artifact, context) if context else None
    for events in decode_text(artifact, layout, samplings, random_streams, cache, len(context)):
        yield from events


def _record(line: Line, completions: Sequence[Completion]) -> dict[str, Any]:
    head = {"line": line.number, **line.echoed}
    if line.error is not None:
        return head | {"error": line.error}
    return head | {"completions": [_completion(completion) for completion in completions]}


def _completion(completion: Completion) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "new_tokens": len(completion.token_ids),
    }
    return facts if completion.logprobs is None else facts | {"logprobs": list(completion.logprobs)}
