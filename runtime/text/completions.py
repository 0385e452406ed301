"""Events of a stream and the completions that they add up to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pos2d.runtime.engine.sequence import FinishReason, TopTokens


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one branch, or the end of the branch.

    ``text`` is the text that the token completes; it is empty while a character or a possible stop string is
    incomplete. The last event of a branch has a ``finish_reason``: ``stop`` for an end token or a stop string, else
    ``length``. ``token`` is None where an end token was sampled. ``logprob`` and the most likely tokens with theirs are
    there if the options record them.
    """

    branch: int
    token: int | None
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    top_logprobs: TopTokens | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt, without its end token.

    If the options record them, it has the ``logprobs`` of its tokens, and in ``top_logprobs`` the most likely tokens in
    place of each.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopTokens, ...] | None = None


def collect(events: Iterable[Event], prompts: Sequence[str]) -> list[Completion]:
    """The completions of a stream of events, in the order of ``prompts``."""
    by_branch: list[list[Event]] = [[] for _ in prompts]
    for event in events:
        by_branch[event.branch].append(event)
    return [completion(prompt, branch) for prompt, branch in zip(prompts, by_branch, strict=True)]


def completion(prompt: str, events: Sequence[Event]) -> Completion:
    """The completion of one branch, from its events."""
    tokens = [event for event in events if event.token is not None]
    logprobs = [event.logprob for event in tokens if event.logprob is not None]
    top_logprobs = [event.top_logprobs for event in tokens if event.top_logprobs is not None]
    return Completion(
        prompt=prompt,
        text="".join(event.text for event in events),
        token_ids=tuple(event.token for event in tokens if event.token is not None),
        finish_reason=(events[-1].finish_reason if events else None) or "length",
        logprobs=tuple(logprobs) if logprobs else None,
        top_logprobs=tuple(top_logprobs) if top_logprobs else None,
    )
