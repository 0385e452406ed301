"""A loaded artifact: logits and generation, in token ids and in texts, the same for every backend."""

from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError, UsageError
from pos2d.layout import Ints, build_layout, columnar_mask
from pos2d.manifest import Manifest
from pos2d.runtime.engine.backend import Backend, Floats
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import SamplingFlags, resolve_sampling
from pos2d.runtime.engine.sequence import Column
from pos2d.runtime.flags import check_known
from pos2d.runtime.model.async_iteration import iterate_in
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.conversation import Conversation
from pos2d.runtime.text.requests import GenerationFlags, prepare, stream
from pos2d.runtime.text.tokenization import load_tokenizer
from pos2d.spec import Visibility


@dataclass(frozen=True, eq=False)
class Model:
    """What :func:`pos2d.load` returns: texts through ``generate``, ``stream`` and ``chat``, ids through the rest."""

    path: Path
    manifest: Manifest = field(repr=False)
    backend: Backend = field(repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The artifact's own; read when it is first asked for."""
        return load_tokenizer(self.path)

    @cached_property
    def _worker(self) -> ThreadPoolExecutor:
        """Where the asynchronous variants run, one after the other."""
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos2d")

    def generate(
        self, prompts: str | Sequence[str], context: str | None = None, **options: Unpack[GenerationFlags]
    ) -> list[Completion]:
        """Answer prompts side by side; the arguments are those of :meth:`stream`."""
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        return collect(self.stream(asked, context, **options), asked)

    def stream(
        self, prompts: str | Sequence[str], context: str | None = None, **options: Unpack[GenerationFlags]
    ) -> Iterator[Event]:
        """The same, token by token while it is written; ``Event.branch`` counts the prompts.

        Args:
            prompts: one is ordinary text, several are branches of one sequence, or of several after ``max_branches``.
            context: read once, and seen by all prompts; the system turn of a chat template.
            options: the fields of :class:`pos2d.runtime.text.requests.GenerationFlags`; what is left out is the
            artifact's.

        Raises:
            InputError: no tokenizer, no or an empty prompt, prompts longer than the model.
            UsageError: a value out of range.
        """
        asked = prepare(self, [prompts] if isinstance(prompts, str) else list(prompts), context, options)
        return stream(self, asked)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[SamplingFlags]) -> Completion:
        """The next turn after ``messages``, each with its ``role`` and ``content``; the last one is the user's.

        :meth:`conversation` keeps what was read of earlier turns.

        Raises:
            InputError: no chat template, or messages that it does not take.
            UsageError: a value out of range.
        """
        return collect(self._turn(messages, options), [messages[-1]["content"]])[0]

    def conversation(
        self, messages: Sequence[Mapping[str, str]] = (), **options: Unpack[GenerationFlags]
    ) -> Conversation:
        """A conversation that goes on from ``messages``; its cache stays from turn to turn."""
        return Conversation(self, messages, options)

    async def agenerate(
        self, prompts: str | Sequence[str], context: str | None = None, **options: Unpack[GenerationFlags]
    ) -> list[Completion]:
        """:meth:`generate`, without keeping the event loop waiting."""
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        return collect([event async for event in self.astream(asked, context, **options)], asked)

    def astream(
        self, prompts: str | Sequence[str], context: str | None = None, **options: Unpack[GenerationFlags]
    ) -> AsyncIterator[Event]:
        """:meth:`stream`, without keeping the event loop waiting; leaving it early ends the writing."""
        return iterate_in(self._worker, lambda: self.stream(prompts, context, **options))

    async def achat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[SamplingFlags]) -> Completion:
        """:meth:`chat`, without keeping the event loop waiting."""
        events = iterate_in(self._worker, lambda: self._turn(messages, options))
        return collect([event async for event in events], [messages[-1]["content"]])[0]

    def _turn(self, messages: Sequence[Mapping[str, str]], options: SamplingFlags) -> Iterator[Event]:
        check_known(SamplingFlags, options)
        *earlier, last = messages or [{}]
        return self.conversation(earlier, **options).ask(last)

    def logits(
        self,
        input_ids: npt.ArrayLike,
        position_ids: npt.ArrayLike | None = None,
        pos2d: npt.ArrayLike | None = None,
    ) -> Floats:
        """Logits float32 ``[B, S, V]`` of one pass without a cache.

        Shapes: ``input_ids`` and ``position_ids`` ``[B, S]`` (or ``[S]``), ``pos2d`` ``[B, S, 2]`` (branch, time).
        Positions left out are 0, 1, 2, …; without ``pos2d`` the sequence is one branch of ordinary text. The mask is
        columnar: a token sees itself and every token of an earlier time.

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
        longest = 1 + int(max(positions.max(), pairs[..., 1].max()))
        if longest > self.manifest.context_length:
            raise InputError(f"the input takes {longest} positions, the model has {self.manifest.context_length}")
        return self.backend.forward(ids, positions, pairs, columnar_mask(pairs[..., 1]))

    def generate_ids(
        self,
        branches: Sequence[Sequence[int]],
        context_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Collection[int] | int | None = None,
        ignore_eos: bool = False,
        visibility: Visibility | None = None,
        **sampling: Unpack[SamplingFlags],
    ) -> list[list[int]]:
        """New token ids of every branch, without the end token; the arguments are those of :meth:`stream_ids`."""
        new: list[list[int]] = [[] for _ in branches]
        for column in self.stream_ids(
            branches,
            context_ids,
            eos_token_ids=eos_token_ids,
            ignore_eos=ignore_eos,
            visibility=visibility,
            **sampling,
        ):
            for ids, token in zip(new, column.tokens, strict=True):
                if token is not None:
                    ids.append(token)
        return new

    def stream_ids(
        self,
        branches: Sequence[Sequence[int]],
        context_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Collection[int] | int | None = None,
        ignore_eos: bool = False,
        visibility: Visibility | None = None,
        **sampling: Unpack[SamplingFlags],
    ) -> Iterator[Column]:
        """Decode prompts side by side with a cache, one column of tokens a step. Nothing is text here.

        Args:
            branches: prompts as token ids; one is ordinary text, several are branches of one sequence.
            context_ids: tokens that all branches see, before them.
            eos_token_ids: in place of the artifact's end tokens; ``ignore_eos`` decodes past them.
            visibility: in place of the artifact's own.
            sampling: the fields of :class:`pos2d.runtime.Sampling`; greedy where nothing is said, whatever the
            artifact's
                generation settings are.

        Raises:
            InputError: no or an empty prompt, ids outside the vocabulary, prompts longer than the model.
            UsageError: a number out of range, or texts that end answers.
        """
        check_known(SamplingFlags, sampling)
        options = resolve_sampling(self.path, sampling, below={})
        if options.stop or options.end_token:
            raise UsageError("stop and end_token are texts; use stream() or generate(), or eos_token_ids")
        layout = build_layout(branches, self.manifest.rope_2d, context_ids, visibility)
        self.check_ids(layout.ids)
        ends = self.manifest.eos_token_ids if eos_token_ids is None else eos_token_ids
        end_tokens = {ends} if isinstance(ends, int) else set(ends)
        writers = [
            Sampler(options, (branch,), () if ignore_eos else end_tokens, [*(context_ids or ()), *ids])
            for branch, ids in enumerate(branches)
        ]
        return decode(self.backend, layout, writers, context_length=self.manifest.context_length)

    def check_ids(self, ids: Ints) -> None:
        """Raises:
        InputError: none, or some that the model does not have.
        """
        if ids.size == 0:
            raise InputError("the input has no tokens")
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            raise InputError(
                f"token ids {ids.min()} to {ids.max()} are outside the vocabulary of {self.manifest.vocab_size}"
            )


def _for_batch(values: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Ints:
    """``values`` of the whole batch, or of one sequence that stands for all."""
    array = np.asarray(values, dtype=np.int64)
    if array.shape not in (shape, shape[1:], (1, *shape[1:])):
        raise InputError(f"{name} has shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(np.broadcast_to(array, shape))
