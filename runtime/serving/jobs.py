"""A job of the engine: one sequence to answer, and the limits under which it may run."""

from collections.abc import Sequence
from dataclasses import dataclass

from pos2d.errors import Pos2DError
from pos2d.layout import Layout
from pos2d.runtime.engine.sampling import Sampling


class BusyError(Pos2DError):
    """The queue is full; the same job may be accepted ``retry_after`` seconds later."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One sequence to answer; every branch of ``layout`` has its own sampling options and random stream.

    ``random_streams`` identify the random numbers of each branch under the seed. ``scores_prompt``: the log
    probabilities of the prompt's own tokens are computed as well.
    """

    layout: Layout
    samplings: tuple[Sampling, ...]
    random_streams: tuple[tuple[int, ...], ...]
    scores_prompt: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PromptScores:
    """Log probabilities of a prompt's tokens, by slot of the layout; the first token of a sequence has none.

    ``top`` are the most likely tokens of each slot with their log probabilities, best first, as many as the sampling
    options' ``top_logprobs``.
    """

    logprobs: Sequence[float | None]
    top: Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine is doing: numbers of jobs, branches, and tokens of KV cache.

    ``kv_tokens`` are those that running jobs have reserved of the ``kv_budget``; ``waiting`` jobs have none yet.
    """

    running: int
    waiting: int
    branches: int
    kv_tokens: int
    kv_budget: int
