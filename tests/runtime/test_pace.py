"""The pieces in which prompts are read take about as long as some steps of those who write."""

import numpy as np
import pytest

from pos2d.runtime.scheduling.pace import FIRST_PIECE, LEAST, ROUNDED_TO, STEPS_A_PIECE, MeasuredPieces, WholeChunks

CHUNK = 512


@pytest.mark.parametrize("pass_ms", [0.0, 8.0, 25.0])
@pytest.mark.parametrize("token_ms", [0.1, 1.1, 2.5])
@pytest.mark.parametrize("step_ms", [10.0, 27.0, 90.0])
def test_pieces_take_as_long_as_they_may(pass_ms: float, token_ms: float, step_ms: float) -> None:
    """A pass costs ``pass_ms`` beside its tokens; prompts have all lengths, and measurements are noisy."""
    random = np.random.default_rng(0)
    pace, taken = MeasuredPieces(CHUNK), list[float]()
    for number in range(60):
        left = int(random.integers(1, 1500))
        while left:
            pace.wrote(step_ms * random.uniform(0.9, 1.1))
            wanted = pace.piece(8, 256)
            tokens = min(left, wanted)
            milliseconds = pass_ms + tokens * token_ms
            if number >= 20 and tokens == wanted:
                taken.append(milliseconds)
            pace.read(tokens, 256, milliseconds * random.uniform(0.9, 1.1))
            left -= tokens
    longest, shortest = pass_ms + CHUNK * token_ms, pass_ms + LEAST * token_ms
    aim = min(max(STEPS_A_PIECE * step_ms, shortest), longest)
    rounding = ROUNDED_TO / 2 * token_ms
    assert 0.8 * aim - rounding <= np.mean(taken) <= 1.2 * aim + rounding


def test_a_long_prompt_begins_with_a_short_piece() -> None:
    """What short prompts took says nothing of it."""
    pace = MeasuredPieces(CHUNK)
    pace.wrote(30.0)
    pace.read(64, 256, 64 * 0.1)
    before = pace.piece(8, 256)
    assert before > 400
    assert pace.piece(8, 1024) == FIRST_PIECE
    pace.read(FIRST_PIECE, 1024, FIRST_PIECE * 1.5)
    assert LEAST <= pace.piece(8, 1024) <= STEPS_A_PIECE * 30 / 1.5 + ROUNDED_TO
    assert pace.piece(8, 256) == before


def test_nobody_who_writes_means_whole_chunks() -> None:
    assert MeasuredPieces(CHUNK).piece(0, 256) == CHUNK
    assert WholeChunks(7).piece(8, 256) == 7
