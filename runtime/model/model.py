"""A loaded artifact: logits and generation, from token ids and from texts, the same for every backend."""

import warnings
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError, UsageError
from pos2d.layout import Ints, build_layout, columnar_mask
from pos2d.messages import content_text
from pos2d.options import takes_options
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import SamplingOptions, resolve_sampling
from pos2d.runtime.engine.sequence import Column
from pos2d.runtime.model.async_iteration import iterate_in
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.conversation import Conversation
from pos2d.runtime.text.options import ContextOptions, LayoutOptions, PromptOptions, RequestOptions, request_options
from pos2d.runtime.text.requests import prepare_request, stream_events
from pos2d.runtime.text.sampling_checks import check_biases
from pos2d.spec import Visibility


@dataclass(frozen=True, eq=False)
class Model(LoadedArtifact):
    """The result of :func:`pos2d.load`: ``generate``, ``stream`` and ``chat`` take texts, the other methods token ids.

    Options are keywords; those that are not given are the artifact's.
    """

    @cached_property
    def _worker(self) -> ThreadPoolExecutor:
        """The thread in which the asynchronous methods run, one call after the other."""
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos2d")

    @takes_options(SamplingOptions, LayoutOptions, PromptOptions, ContextOptions)
    def generate(self, prompts: str | Sequence[str], context: str | None = None, **options: Any) -> list[Completion]:
        """Answer one or several prompts; the arguments are those of :meth:`stream`."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return collect(self.stream(texts, context, **options), texts)

    @takes_options(SamplingOptions, LayoutOptions, PromptOptions, ContextOptions)
    def stream(self, prompts: str | Sequence[str], context: str | None = None, **options: Any) -> Iterator[Event]:
        """Answer prompts token by token; ``Event.branch`` counts the prompts.

        Args:
            prompts: one is a single sequence; several are branches of one sequence, or of several sequences with at
                most ``max_branches`` each.
            context: text that all prompts see, prefilled once; the system message of a chat template.

        Raises:
            InputError: no tokenizer, no prompt or an empty one, prompts longer than the model, or, before the first
                event, a ``cache_context`` of something else.
            UsageError: a value out of range.
            StorageError: before the first event, a ``cache_context`` that cannot be read or written.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return stream_events(self, prepare_request(self, texts, context, self._request_options(options)))

    @takes_options(SamplingOptions, PromptOptions)
    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """The answer to ``messages``, each with its ``role`` and ``content``.

        A content is a text or a list of text parts. If the last message is the assistant's, it is continued.

        :meth:`conversation` keeps the KV cache of earlier turns.

        Raises:
            InputError: no chat template, or messages that it does not accept.
            UsageError: a value out of range.
        """
        return collect(self._next_turn(messages, options), [_last_text(messages)])[0]

    @takes_options(SamplingOptions, LayoutOptions, PromptOptions, ContextOptions)
    def conversation(self, messages: Sequence[Mapping[str, Any]] = (), **options: Any) -> Conversation:
        """A conversation that continues ``messages``, with one KV cache for all turns."""
        return Conversation(self, messages, self._request_options(options))

    @takes_options(SamplingOptions, LayoutOptions, PromptOptions, ContextOptions)
    async def agenerate(
        self, prompts: str | Sequence[str], context: str | None = None, **options: Any
    ) -> list[Completion]:
        """:meth:`generate`, without blocking the event loop."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return collect([event async for event in self.astream(texts, context, **options)], texts)

    @takes_options(SamplingOptions, LayoutOptions, PromptOptions, ContextOptions)
    def astream(self, prompts: str | Sequence[str], context: str | None = None, **options: Any) -> AsyncIterator[Event]:
        """:meth:`stream`, without blocking the event loop; leaving it early stops the generation."""
        return iterate_in(self._worker, lambda: self.stream(prompts, context, **options))

    @takes_options(SamplingOptions, PromptOptions)
    async def achat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """:meth:`chat`, without blocking the event loop."""
        events = iterate_in(self._worker, lambda: self._next_turn(messages, options))
        return collect([event async for event in events], [_last_text(messages)])[0]

    def _request_options(self, options: Mapping[str, Any]) -> RequestOptions:
        """The options of a request; warns of generation settings of the artifact that are not used."""
        found = request_options(self.path, options)
        for warning in found.sampling.warnings(self.path):
            warnings.warn(warning, stacklevel=4)
        return found

    def _next_turn(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Iterator[Event]:
        if isinstance(messages, str | Mapping) or not messages:
            raise InputError("`messages` must be a list of turns, at least one; each has a role and a content")
        *earlier, last = messages
        return self.conversation(earlier, **options).ask(last)

    def logits(
        self,
        input_ids: npt.ArrayLike,
        position_ids: npt.ArrayLike | None = None,
        pos2d: npt.ArrayLike | None = None,
    ) -> Floats:
        """Logits float32 ``[B, S, V]`` of one forward pass without a cache.

        Shapes: ``input_ids`` and ``position_ids`` ``[B, S]`` (or ``[S]``), ``pos2d`` ``[B, S, 2]`` (branch, time).
        ``position_ids`` default to 0, 1, 2, …; without ``pos2d`` every sequence is one branch. The mask is columnar: a
        token sees itself and every token of an earlier time.

        Raises:
            InputError: shapes that do not fit, token ids outside the vocabulary, or more positions than the model has.
        """
        ids = np.atleast_2d(np.asarray(input_ids, dtype=np.int64))
        self.check_ids(ids)
        positions = _for_batch(
            np.arange(ids.shape[1]) if position_ids is None else position_ids, ids.shape, "position_ids"
        )
        if pos2d is None:
            pairs = np.stack([np.zeros_like(positions), positions], axis=-1)
        else:
            pairs = _for_batch(pos2d, (*ids.shape, 2), "pos2d")
        length = 1 + int(max(positions.max(), pairs[..., 1].max()))
        if length > self.manifest.context_length:
            raise InputError(f"the input takes {length} positions, the model has {self.manifest.context_length}")
        return self.backend.forward(ids, positions, pairs, columnar_mask(pairs[..., 1]))

    @takes_options(SamplingOptions)
    def generate_ids(
        self,
        branches: Sequence[Sequence[int]],
        context_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Collection[int] | int | None = None,
        ignore_eos: bool = False,
        visibility: Visibility | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """New token ids of every branch, without the end token; the arguments are those of :meth:`stream_ids`."""
        new_ids: list[list[int]] = [[] for _ in branches]
        for column in self.stream_ids(
            branches,
            context_ids,
            eos_token_ids=eos_token_ids,
            ignore_eos=ignore_eos,
            visibility=visibility,
            **options,
        ):
            for ids, token in zip(new_ids, column.tokens, strict=True):
                if token is not None:
                    ids.append(token)
        return new_ids

    @takes_options(SamplingOptions)
    def stream_ids(
        self,
        branches: Sequence[Sequence[int]],
        context_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Collection[int] | int | None = None,
        ignore_eos: bool = False,
        visibility: Visibility | None = None,
        **options: Any,
    ) -> Iterator[Column]:
        """Decode prompts with a cache, one column of tokens a step. No text is involved.

        Greedy unless ``options`` say otherwise, whatever the artifact's generation settings are.

        Args:
            branches: prompts as token ids; one is a single sequence, several are branches of one sequence.
            context_ids: tokens before the branches, which all of them see.
            eos_token_ids: end tokens in place of the artifact's; ``ignore_eos`` decodes past them.
            visibility: in place of the artifact's.

        Raises:
            InputError: no prompt or an empty one, ids outside the vocabulary, prompts longer than the model.
            UsageError: a value out of range, texts that end answers, or end tokens that are no token ids.
        """
        sampling = resolve_sampling(self.path, options, defaults={})
        if sampling.stop or sampling.end_token:
            raise UsageError("`stop` and `end_token` are texts; use stream() or generate(), or `eos_token_ids`")
        check_biases(self, sampling)
        layout = build_layout(branches, self.manifest.rope_2d, context_ids, visibility)
        self.check_ids(layout.ids)
        end_tokens = self._end_tokens(eos_token_ids)
        samplers = [
            Sampler(sampling, (branch,), () if ignore_eos else end_tokens, [*(context_ids or ()), *ids])
            for branch, ids in enumerate(branches)
        ]
        return decode(self.backend, layout, samplers, context_length=self.manifest.context_length)

    def _end_tokens(self, given: Collection[int] | int | None) -> set[int]:
        """The end tokens of the caller, else of the artifact, whose tokenizer may have more tokens than the model.

        Raises:
            UsageError: a token of the caller that is not in the vocabulary.
        """
        vocabulary = range(self.manifest.vocab_size)
        if given is None:
            return {token for token in self.manifest.eos_token_ids if token in vocabulary}
        try:
            tokens = {index(token) for token in (given if isinstance(given, Collection) else [given])}
        except TypeError:
            raise UsageError(f"`eos_token_ids` {given!r} are not token ids") from None
        outside = sorted(token for token in tokens if token not in vocabulary)
        if outside:
            raise UsageError(
                f"`eos_token_ids` {', '.join(map(str, outside))} are outside the vocabulary of {len(vocabulary)}; "
                "`ignore_eos=True` decodes without an end token"
            )
        return tokens


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    return content_text(messages[-1]["content"]) or ""


def _for_batch(values: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Ints:
    """``values`` with ``shape`` ``[B, ...]``; those of one sequence are repeated for the whole batch.

    Raises:
        InputError: another shape.
    """
    array = np.asarray(values, dtype=np.int64)
    if array.shape not in (shape, shape[1:], (1, *shape[1:])):
        raise InputError(f"`{name}` has shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(np.broadcast_to(array, shape))
