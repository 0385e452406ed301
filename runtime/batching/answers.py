"""The records of a window of lines: lines with a single prompt share sequences, other lines have their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from pos2d.layout import build_layout
from pos2d.runtime.batching.lines import Line
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.requests import Request, stream_events
from pos2d.runtime.text.text_decode import decode_text

# Prompt tokens of lines that share a sequence: beyond it, masking each other's tokens costs more than sharing saves.
SHARED_TOKENS = 2048


def records_in_order(
    artifact: LoadedArtifact, lines: Sequence[Line], done: int, branches_per_sequence: int
) -> Iterator[list[dict[str, Any]]]:
    """Answer the lines of one window; yield the records after the first ``done`` of the file, in the order of lines.

    Groups that the file has whole are not decoded again.
    """
    ready: dict[int, dict[str, Any]] = {}
    following = max(done + 1, lines[0].number)
    for group in _groups(lines, branches_per_sequence):
        if group[-1].number <= done:
            continue
        for line, completions in zip(group, _answers(artifact, group), strict=True):
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
    shared: list[Line] = []
    for line in lines:
        if not line.is_single:
            groups.append([line])
            continue
        if shared and (len(shared) == size or _prompt_tokens([*shared, line]) > SHARED_TOKENS):
            groups.append(shared)
            shared = []
        shared.append(line)
    if shared:
        groups.append(shared)
    return sorted(groups, key=lambda group: group[-1].number)


def _prompt_tokens(lines: Sequence[Line]) -> int:
    return sum(request.encoded.prompt_tokens for request in _requests(lines))


def _requests(lines: Sequence[Line]) -> list[Request]:
    return [line.request for line in lines if line.request is not None]


def _answers(artifact: LoadedArtifact, group: Sequence[Line]) -> list[list[Completion]]:
    """The completions of every line of a group; a record does not repeat the prompts, so they are left empty here."""
    requests = _requests(group)
    if not requests:
        return [[]]
    if not group[0].is_single:
        (request,) = requests
        return [collect(stream_events(artifact, request), [""] * len(request.encoded.branches))]
    return [[completion] for completion in collect(_shared_events(artifact, requests), [""] * len(group))]


def _shared_events(artifact: LoadedArtifact, requests: Sequence[Request]) -> Iterator[Event]:
    """Decode single prompts as branches of one isolated sequence: each is answered as if it were alone."""
    prompts = [request.encoded.branches[0] for request in requests]
    layout = build_layout(prompts, artifact.manifest.rope_2d, visibility="isolated")
    samplings = [request.sampling for request in requests]
    random_streams = [(0,)] * len(requests)  # as if each were the only prompt
    for events in decode_text(artifact, layout, samplings, random_streams):
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
