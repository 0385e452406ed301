"""A loaded artifact: logits and generation in token ids, the same for every backend."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError, UsageError
from pos2d.layout import Ints, build_layout, columnar_mask
from pos2d.manifest import Manifest
from pos2d.spec import Visibility
from runtime.backend import Backend, Floats
from runtime.engine import Column, decode
from runtime.sampling import Sampler


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What :func:`runtime.load` returns."""

    path: Path
    manifest: Manifest
    backend: Backend

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
        self._check_ids(ids)
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
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        eos_token_ids: Collection[int] | int | None = None,
        ignore_eos: bool = False,
        visibility: Visibility | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """New token ids of every branch, without the end token; the arguments are those of :meth:`stream_ids`."""
        new: list[list[int]] = [[] for _ in branches]
        for column in self.stream_ids(
            branches, context_ids, max_new_tokens, temperature, eos_token_ids, ignore_eos, visibility, seed
        ):
            for ids, token in zip(new, column.tokens, strict=True):
                if token is not None:
                    ids.append(token)
        return new

    def stream_ids(
        self,
        branches: Sequence[Sequence[int]],
        context_ids: Sequence[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        eos_token_ids: Collection[int] | int | None = None,
        ignore_eos: bool = False,
        visibility: Visibility | None = None,
        seed: int = 0,
    ) -> Iterator[Column]:
        """Decode prompts side by side with a cache, one column of tokens a step.

        Args:
            branches: prompts as token ids; one is ordinary text, several are branches of one sequence.
            context_ids: tokens that all branches see, before them.
            max_new_tokens: for each branch.
            temperature: 0 is greedy.
            eos_token_ids: in place of the artifact's end tokens; ``ignore_eos`` decodes past them.
            visibility: in place of the artifact's own.
            seed: of the random draws at a temperature above 0.

        Raises:
            InputError: no or an empty prompt, ids outside the vocabulary, prompts longer than the model.
            UsageError: a number out of range.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {max_new_tokens} must be at least 1")
        layout = build_layout(branches, self.manifest.rope_2d, context_ids, visibility)
        self._check_ids(layout.ids)
        ends = self.manifest.eos_token_ids if eos_token_ids is None else eos_token_ids
        end_tokens = {ends} if isinstance(ends, int) else set(ends)
        return decode(
            self.backend,
            layout,
            Sampler(temperature, seed),
            max_new_tokens=max_new_tokens,
            end_tokens=set() if ignore_eos else end_tokens,
            context_length=self.manifest.context_length,
        )

    def _check_ids(self, ids: Ints) -> None:
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
