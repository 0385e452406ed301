"""How many tokens of a prompt are read between two steps of the sequences that already write."""

from dataclasses import dataclass
from typing import Protocol

# A piece may take as long as this many steps, so that nobody's next token is late by more than that.
STEPS_A_PIECE = 1.5
LEAST, ROUNDED_TO, FIRST_PIECE = 8, 4, 8
# Weight of the newest measurement in the running means.
NEWEST = 0.2
# Of the line through the origin, in units of the squared mean number of tokens; and how much less a further token may
# cost than the mean one.
PRIOR, STEEPEST = 0.01, 4.0


class Pace(Protocol):
    """Decides the size of the pieces in which prompts are read.

    ``bound`` is the least number of tokens that the sequences of a group have room for: a token of a longer sequence
    takes longer.
    """

    def piece(self, writers: int, bound: int) -> int:
        """Number of prompt tokens to read now, while ``writers`` sequences wait for their next token."""

    def read(self, tokens: int, bound: int, seconds: float) -> None:
        """Note how long a piece took."""

    def wrote(self, seconds: float) -> None:
        """Note how long a step of the writers took."""


class WholeChunks:
    """Every piece is a whole chunk. What is computed then depends on nothing that was measured."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk

    def piece(self, writers: int, bound: int) -> int:
        return self._chunk

    def read(self, tokens: int, bound: int, seconds: float) -> None:
        pass

    def wrote(self, seconds: float) -> None:
        pass


class MeasuredPieces:
    """Whole chunks while nobody writes, else as many tokens as are read in :data:`STEPS_A_PIECE` steps."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._costs: dict[int, PieceCosts] = {}
        self._step_seconds: float | None = None

    def piece(self, writers: int, bound: int) -> int:
        if not writers:
            return self._chunk
        costs = self._costs.get(bound)
        if costs is None or self._step_seconds is None:
            return min(FIRST_PIECE, self._chunk)
        tokens = costs.tokens_in(STEPS_A_PIECE * self._step_seconds)
        return max(LEAST, min(self._chunk, ROUNDED_TO * round(tokens / ROUNDED_TO)))

    def read(self, tokens: int, bound: int, seconds: float) -> None:
        costs = self._costs.get(bound)
        self._costs[bound] = PieceCosts(tokens, seconds) if costs is None else costs.updated(tokens, seconds)

    def wrote(self, seconds: float) -> None:
        self._step_seconds = seconds if self._step_seconds is None else _mean(self._step_seconds, seconds)


@dataclass(frozen=True, slots=True)
class PieceCosts:
    """Running means over pieces, to which a line of seconds over tokens is fitted.

    A pass costs something however few tokens it reads; without that, small pieces would seem dear, and pieces would
    become ever smaller.
    """

    tokens: float
    seconds: float
    variance: float = 0.0
    covariance: float = 0.0

    def updated(self, tokens: int, seconds: float) -> "PieceCosts":
        """These means with a further piece."""
        more_tokens, more_seconds = tokens - self.tokens, seconds - self.seconds
        return PieceCosts(
            _mean(self.tokens, tokens),
            _mean(self.seconds, seconds),
            (1 - NEWEST) * (self.variance + NEWEST * more_tokens**2),
            (1 - NEWEST) * (self.covariance + NEWEST * more_tokens * more_seconds),
        )

    def tokens_in(self, seconds: float) -> float:
        """The number of tokens that are read in so many seconds."""
        # Where all pieces had about the same size, the line goes through the origin.
        prior = PRIOR * self.tokens**2
        proportional = self.seconds / self.tokens
        slope = (self.covariance + prior * proportional) / (self.variance + prior)
        slope = min(max(slope, proportional / STEEPEST), proportional)
        return self.tokens + (seconds - self.seconds) / slope


def _mean(before: float, newest: float) -> float:
    return before + NEWEST * (newest - before)
