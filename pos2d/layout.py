"""Lay out branches of token ids as one flat sequence, with a position, a branch and a time for every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError
from pos2d.spec import Rope2DSpec, Visibility

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CONTEXT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One flat sequence of ``S`` tokens; a token's index is its slot in the KV cache. All arrays are int64 ``[S]``.

    ``owners`` has the branch that a token belongs to (from 0), or ``CONTEXT``; ``branches`` has the value that branch
    frequencies are rotated by (index times stride). ``last[k]`` is the slot of branch k's newest token.
    """

    ids: Ints
    positions: Ints
    branches: Ints
    times: Ints
    owners: Ints
    last: tuple[int, ...]
    visibility: Visibility

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pos2d(self) -> Ints:
        """Branch and time of every token, ``[S, 2]``."""
        return np.stack([self.branches, self.times], axis=-1)

    def mask(self, start: int = 0, stop: int | None = None) -> Bools:
        """Which of the first ``stop`` tokens those from ``start`` on may attend to, bool ``[stop - start, stop]``.

        A token attends to itself and to every token of an earlier time; with isolated visibility, only to those of its
        branch and of the context.
        """
        stop = len(self) if stop is None else stop
        visible = self.times[None, :stop] < self.times[start:stop, None]
        if self.visibility == "isolated":
            owners = self.owners[None, :stop]
            visible &= (owners == self.owners[start:stop, None]) | (owners == CONTEXT)
        visible[np.arange(stop - start), np.arange(start, stop)] = True
        return visible

    def append(self, tokens: Sequence[int | None]) -> "Layout":
        """The sequence after one more token for every branch, ``None`` where a branch has stopped.

        New tokens take the next slots in branch order, each at the next time of its branch.
        """
        live = [k for k, token in enumerate(tokens) if token is not None]
        before = np.array([self.last[k] for k in live], dtype=np.int64)
        times = self.times[before] + 1
        slots = np.arange(len(self), len(self) + len(live), dtype=np.int64)
        last = list(self.last)
        for k, slot in zip(live, slots, strict=True):
            last[k] = int(slot)
        return Layout(
            ids=np.append(self.ids, np.array([tokens[k] for k in live], dtype=np.int64)),
            positions=np.append(self.positions, times if self.visibility == "isolated" else slots),
            branches=np.append(self.branches, self.branches[before]),
            times=np.append(self.times, times),
            owners=np.append(self.owners, np.array(live, dtype=np.int64)),
            last=tuple(last),
            visibility=self.visibility,
        )


def build_layout(
    branches: Sequence[Sequence[int]],
    spec: Rope2DSpec,
    context_ids: Sequence[int] | None = None,
    visibility: Visibility | None = None,
) -> Layout:
    """Lay out prompts (lists of token ids) side by side, after an optional context that all of them attend to.

    Tokens are sorted by time, then by branch. Columnar: a token's position is its flat index. Isolated: every branch
    has exactly the positions that it would have alone after the same context, so position equals time. ``visibility``
    overrides that of ``spec``.

    Raises:
        InputError: no branch, or a branch without tokens.
    """
    seen = visibility or spec.visibility
    if not branches:
        raise InputError("there is no prompt; give at least one")
    empty = [k for k, ids in enumerate(branches) if len(ids) == 0]
    if empty:
        raise InputError(f"prompt {', '.join(str(k + 1) for k in empty)} is empty; give it at least one token")

    context = list(context_ids or ())
    longest = max(len(ids) for ids in branches)
    tokens = [(t, CONTEXT, 0, token) for t, token in enumerate(context)]
    for k, ids in enumerate(branches):
        shift = longest - len(ids) if spec.align_to == "right" and seen == "columnar" else 0
        value = _branch_value(k, bool(context), spec, seen)
        tokens += [(len(context) + shift + t, k, value, token) for t, token in enumerate(ids)]
    tokens.sort(key=lambda token: token[:2])

    times, owners, values, flat_ids = (np.array(column, dtype=np.int64) for column in zip(*tokens, strict=True))
    return Layout(
        ids=flat_ids,
        positions=times if seen == "isolated" else np.arange(len(flat_ids), dtype=np.int64),
        branches=values,
        times=times,
        owners=owners,
        last=tuple(int(np.flatnonzero(owners == k)[-1]) for k in range(len(branches))),
        visibility=seen,
    )


def build_continuations(ids: Sequence[int], count: int, spec: Rope2DSpec) -> Layout:
    """Lay out one prompt that has ``count`` answers, each of which has the positions of a single one.

    The last token stands in every branch, and all tokens before it are the context. The branches are isolated, and all
    of them have the branch value 0, as ordinary text has.

    Raises:
        InputError: no tokens.
    """
    if count == 1 or not ids:
        return build_layout([ids], spec)
    shared = len(ids) - 1
    times = np.array([*range(shared), *[shared] * count], dtype=np.int64)
    return Layout(
        ids=np.array([*ids[:-1], *[ids[-1]] * count], dtype=np.int64),
        positions=times,
        branches=np.zeros_like(times),
        times=times,
        owners=np.array([*[CONTEXT] * shared, *range(count)], dtype=np.int64),
        last=tuple(range(shared, shared + count)),
        visibility="isolated",
    )


def _branch_value(branch: int, has_context: bool, spec: Rope2DSpec, visibility: Visibility) -> int:
    """Branch index times stride; the context, where there is one, is branch 0 and the prompts count from 1."""
    if not spec.is_2d:
        return 0
    first = 1 if has_context else 0
    return (first if visibility == "isolated" else first + branch) * spec.branch_stride


def columnar_mask(times: Ints) -> Bools:
    """Columnar visibility of whole sequences: times ``[B, S]`` to bool ``[B, S, S]``, True where allowed."""
    return (times[:, None, :] < times[:, :, None]) | np.eye(times.shape[1], dtype=np.bool_)
