"""From prompts to texts: what an engine's columns say, branch by branch and token by token."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pos2d.errors import UsageError
from pos2d.layout import CONTEXT, Layout
from pos2d.runtime.engine.backend import KVCache
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import Column, FinishReason
from pos2d.runtime.text.tokenization import GrowingText

if TYPE_CHECKING:
    from pos2d.runtime.model.model import Model


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one answer, or its end.

    ``text`` is what became readable with it: nothing while a character or a possible stop is incomplete. The last
    event of a branch has its ``finish_reason`` (``stop``: an end token or a stop text; ``length``), and ``token`` is
    None where an end token was drawn. ``logprob`` is noted where the options ask for it.
    """

    branch: int
    token: int | None
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, without its end token; ``logprobs`` of its tokens where the options ask for them."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None


class TextWriter(Sampler):
    """A sampler that reads what it writes."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        stream: Sequence[int],
        end_tokens: Collection[int],
        prompt_ids: Collection[int],
    ) -> None:
        super().__init__(sampling, stream, end_tokens, prompt_ids)
        self._answer = GrowingText(tokenizer, sampling.stop)
        self._new = ""

    def ended(self, token: int) -> bool:
        self._new += self._answer.append(token)
        return self._answer.stopped

    def take(self, last: bool) -> str:
        """The text since the last call; with ``last``, all that is left."""
        new, self._new = self._new + (self._answer.close() if last else ""), ""
        return new


def answer(
    model: "Model",
    layout: Layout,
    samplings: Sequence[Sampling],
    streams: Sequence[Sequence[int]],
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[Event]:
    """Decode one sequence, each branch with its own options and random numbers; see
    :func:`pos2d.runtime.engine.decode.decode`."""
    writers = [
        TextWriter(
            model.tokenizer,
            sampling,
            stream,
            _drawable({*model.manifest.eos_token_ids, *end_token_ids(model.tokenizer, sampling)}, model),
            set(layout.ids[(layout.owners == branch) | (layout.owners == CONTEXT)].tolist()),
        )
        for branch, (sampling, stream) in enumerate(zip(samplings, streams, strict=True))
    ]
    columns = decode(
        model.backend, layout, writers, context_length=model.manifest.context_length, cache=cache, start=start
    )
    return _events(columns, writers)


def _events(columns: Iterable[Column], writers: Sequence[TextWriter]) -> Iterator[Event]:
    going = list(range(len(writers)))
    for column in columns:
        for branch in going:
            reason = column.finished[branch]
            text = writers[branch].take(last=reason is not None)
            yield Event(branch, column.tokens[branch], text, column.logprobs[branch], reason)
        going = [branch for branch in going if column.finished[branch] is None]


def _drawable(tokens: Collection[int], model: "Model") -> set[int]:
    """A tokenizer may have more tokens than the model, which draws none of those."""
    return {token for token in tokens if token < model.manifest.vocab_size}


def end_token_ids(tokenizer: Any, sampling: Sampling) -> list[int]:
    """Raises:
    UsageError: an end token that the tokenizer does not have.
    """
    vocabulary = tokenizer.get_vocab() if sampling.end_token else {}
    unknown = [token for token in sampling.end_token if token not in vocabulary]
    if unknown:
        raise UsageError(f"end token {', '.join(unknown)} is not in the tokenizer; --stop ends answers at any text")
    return [vocabulary[token] for token in sampling.end_token]


def collect(events: Iterable[Event], prompts: Sequence[str]) -> list[Completion]:
    """The answers that a stream of events makes, in the order of ``prompts``."""
    heard: list[list[Event]] = [[] for _ in prompts]
    for event in events:
        heard[event.branch].append(event)
    return [completion(prompt, events) for prompt, events in zip(prompts, heard, strict=True)]


def completion(prompt: str, events: Sequence[Event]) -> Completion:
    tokens = [event for event in events if event.token is not None]
    logprobs = [event.logprob for event in tokens if event.logprob is not None]
    return Completion(
        prompt=prompt,
        text="".join(event.text for event in events),
        token_ids=tuple(event.token for event in tokens if event.token is not None),
        finish_reason=(events[-1].finish_reason if events else None) or "length",
        logprobs=tuple(logprobs) if logprobs else None,
    )
