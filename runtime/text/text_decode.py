"""Decoding one sequence to text: end tokens, stop strings, and the events of every column."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from pos2d.errors import UsageError
from pos2d.layout import CONTEXT, Layout
from pos2d.runtime.engine.backend import KVCache
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import Column
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.detokenizer import StreamDetokenizer


class TextSampler(Sampler):
    """A sampler that also detokenizes its answer, which may therefore end at a stop string."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        random_stream: Sequence[int],
        end_tokens: Collection[int],
        prompt_ids: Collection[int],
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
            _end_tokens(artifact, sampling),
            set(layout.ids[(layout.owners == branch) | (layout.owners == CONTEXT)].tolist()),
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


def _end_tokens(artifact: LoadedArtifact, sampling: Sampling) -> set[int]:
    """The end tokens of the artifact and of the options; a tokenizer may have tokens that the model does not have."""
    tokens = {*artifact.manifest.eos_token_ids, *end_token_ids(artifact.tokenizer, sampling)}
    return {token for token in tokens if token < artifact.manifest.vocab_size}


def end_token_ids(tokenizer: Any, sampling: Sampling) -> list[int]:
    """The ids of the option ``end_token``.

    Raises:
        UsageError: a token that the tokenizer does not have.
    """
    vocabulary = tokenizer.get_vocab() if sampling.end_token else {}
    unknown = [token for token in sampling.end_token if token not in vocabulary]
    if unknown:
        raise UsageError(
            f"`end_token` {', '.join(map(ascii, unknown))} is not in the tokenizer; `stop` ends answers before any text"
        )
    return [vocabulary[token] for token in sampling.end_token]
