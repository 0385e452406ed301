"""Decoding one sequence to text: end tokens, stop strings, and the events of every column."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from pos2d.layout import CONTEXT, Layout
from pos2d.runtime.engine.backend import KVCache
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import Column
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.detokenizer import StreamDetokenizer
from pos2d.runtime.text.end_tokens import end_tokens


class TextSampler(Sampler):
    """A sampler that also detokenizes its answer, which may therefore end at a stop string."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        random_stream: Sequence[int],
        end_tokens: Collection[int],
        prompt_ids: Sequence[int],
    ) -> None:
        super().__init__(sampling, random_stream, end_tokens, prompt_ids)
        self._detokenizer = StreamDetokenizer(tokenizer, sampling.stop)
        self._new_text = ""

    def append(self, token: int) -> bool:
        """Add a token to the answer; return whether it completes a stop string."""
        self._new_text += self._detokenizer.append(token)
        return self._detokenizer.stopped

    def take_text(self, last: bool) -> str:
        """The text since the last call; with ``last``, also the text that was held back."""
        text, self._new_text = self._new_text + (self._detokenizer.close() if last else ""), ""
        return text


def decode_text(
    artifact: LoadedArtifact,
    layout: Layout,
    samplings: Sequence[Sampling],
    random_streams: Sequence[Sequence[int]],
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[list[Event]]:
    """Decode one sequence; yield the events of every column.

    Every branch has its own sampling options and random numbers. ``cache`` and ``start`` are those of
    :func:`pos2d.runtime.engine.decode.decode`.
    """
    samplers = [
        TextSampler(
            artifact.tokenizer,
            sampling,
            random_stream,
            end_tokens(artifact, sampling),
            layout.ids[(layout.owners == branch) | (layout.owners == CONTEXT)].tolist(),
        )
        for branch, (sampling, random_stream) in enumerate(zip(samplings, random_streams, strict=True))
    ]
    columns = decode(
        artifact.backend,
        layout,
        samplers,
        context_length=artifact.manifest.context_length,
        cache=cache,
        start=start,
    )
    return _events(columns, samplers)


def _events(columns: Iterable[Column], samplers: Sequence[TextSampler]) -> Iterator[list[Event]]:
    live = list(range(len(samplers)))
    for column in columns:
        yield [
            Event(
                branch,
                column.tokens[branch],
                samplers[branch].take_text(last=column.finished[branch] is not None),
                column.logprobs[branch],
                column.finished[branch],
            )
            for branch in live
        ]
        live = [branch for branch in live if column.finished[branch] is None]
