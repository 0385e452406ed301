"""Decoding one sequence to text: end tokens, stop strings, and the events of every column."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pos2d.layout import CONTEXT, Layout
from pos2d.runtime.engine.backend import KVCache
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampler import Constraint, Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import Column
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.detokenizer import StreamDetokenizer
from pos2d.runtime.text.end_tokens import end_tokens


class TextSampler(Sampler):
    """A sampler that also detokenizes its answer, which may therefore end at a stop string or follow a schema."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        random_stream: Sequence[int],
        end_tokens: Collection[int],
        prompt_ids: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__(sampling, random_stream, end_tokens, prompt_ids, constraint)
        self._detokenizer = StreamDetokenizer(tokenizer, sampling.stop)
        self._new_text = ""

    def append(self, token: int) -> bool:
        """Add a token to the answer; return whether it completes a stop string, or what the constraint allows."""
        is_complete = super().append(token)
        self._new_text += self._detokenizer.append(token)
        return is_complete or self._detokenizer.stopped

    def take_text(self, last: bool) -> str:
        """The text since the last call; with ``last``, also the text that was held back."""
        text, self._new_text = self._new_text + (self._detokenizer.close() if last else ""), ""
        return text


class ColumnEvents:
    """Turns the columns of one sequence into events; ``samplers`` are those of its branches."""

    def __init__(self, samplers: Sequence[TextSampler]) -> None:
        self._samplers = samplers
        self._live = list(range(len(samplers)))

    def of(self, column: Column) -> list[Event]:
        """The events of a column, one for each branch that had not ended before it."""
        events = [
            Event(
                branch,
                column.tokens[branch],
                self._samplers[branch].take_text(last=column.finished[branch] is not None),
                column.logprobs[branch],
                column.finished[branch],
                column.top_logprobs[branch],
            )
            for branch in self._live
        ]
        self._live = [branch for branch in self._live if column.finished[branch] is None]
        return events

    def cancelled(self) -> list[Event]:
        """The last events of the branches that have not ended, with the text that was held back."""
        live, self._live = self._live, []
        return [Event(k, None, self._samplers[k].take_text(last=True), finish_reason="cancelled") for k in live]


def text_samplers(
    artifact: LoadedArtifact, layout: Layout, samplings: Sequence[Sampling], random_streams: Sequence[Sequence[int]]
) -> list[TextSampler]:
    """The samplers of a layout's branches, each with its own options, random numbers and schema."""
    samplers = []
    for branch, (sampling, random_stream) in enumerate(zip(samplings, random_streams, strict=True)):
        ends = end_tokens(artifact, sampling)
        prompt_ids = layout.ids[(layout.owners == branch) | (layout.owners == CONTEXT)].tolist()
        schema = sampling.json_schema
        constraint = None if schema is None else artifact.json_schemas.constraint(schema, ends)
        samplers.append(TextSampler(artifact.tokenizer, sampling, random_stream, ends, prompt_ids, constraint))
    return samplers


def decode_text(
    artifact: LoadedArtifact,
    layout: Layout,
    samplings: Sequence[Sampling],
    random_streams: Sequence[Sequence[int]],
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[list[Event]]:
    """Decode one sequence; yield the events of every column.

    ``cache`` and ``start`` are those of :func:`pos2d.runtime.engine.decode.decode`.
    """
    samplers = text_samplers(artifact, layout, samplings, random_streams)
    columns = decode(
        artifact.backend,
        layout,
        samplers,
        context_length=artifact.manifest.context_length,
        cache=cache,
        start=start,
    )
    return map(ColumnEvents(samplers).of, columns)
