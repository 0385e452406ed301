"""Scores the tokens of a prompt while it is read."""

from pos2d.layout import Layout
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.prompt_scores import score_tokens
from pos2d.runtime.engine.sequence import TopTokens
from pos2d.runtime.scheduling.prefixes import plain_length
from pos2d.runtime.serving.jobs import PromptScores


class PromptScorer:
    """Collects log probabilities of the tokens of a text, and ``top`` most likely ones for each.

    The text are the tokens at the beginning of ``layout`` that stand as those of an ordinary text: all of a single
    prompt, and the context of several.
    """

    def __init__(self, layout: Layout, top: int) -> None:
        self._ids = layout.ids[: plain_length(layout)].tolist()
        self._top = top
        self._logprobs: list[float | None] = [None]
        self._best: list[TopTokens] = [()]

    def __call__(self, start: int, logits: Floats) -> None:
        """Take the logits ``[S, V]`` of the slots from ``start`` on; each belongs to the token after it."""
        following = self._ids[start + 1 : start + 1 + len(logits)]
        scores = score_tokens(logits[: len(following)], following, self._top)
        self._logprobs += scores.logprobs
        self._best += scores.top

    def scores(self) -> PromptScores:
        """What was collected; the first token has no log probability."""
        return PromptScores(tuple(self._logprobs), tuple(self._best))
