"""How many tokens of a prompt are read between two steps of the sequences that already write."""

from typing import Protocol

# A piece may take as long as this many steps, so that nobody's next token is late by more than that.
STEPS_A_PIECE = 1.5
LEAST, ROUNDED_TO, FIRST_PIECE = 8, 8, 16
# Weight of the newest measurement in the running means.
NEWEST = 0.2


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
        self._token_seconds: dict[int, float] = {}
        self._step_seconds: float | None = None

    def piece(self, writers: int, bound: int) -> int:
        if not writers:
            return self._chunk
        token_seconds = self._token_seconds.get(bound)
        if token_seconds is None or self._step_seconds is None:
            return min(FIRST_PIECE, self._chunk)
        tokens = int(STEPS_A_PIECE * self._step_seconds / token_seconds)
        return max(LEAST, min(self._chunk, tokens - tokens % ROUNDED_TO))

    def read(self, tokens: int, bound: int, seconds: float) -> None:
        # Short pieces cost more for each token than whole chunks, and late ones more than early ones, so the newest
        # measurement counts at once where it is higher.
        newest = seconds / tokens
        self._token_seconds[bound] = max(newest, _mean(self._token_seconds.get(bound), newest))

    def wrote(self, seconds: float) -> None:
        self._step_seconds = _mean(self._step_seconds, seconds)


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST * (newest - before)
