"""The pieces in which prompts are read take no longer than some steps of those who write."""

import pytest

from pos2d.runtime.scheduling.pace import FIRST_PIECE, LEAST, STEPS_A_PIECE, MeasuredPieces, WholeChunks

CHUNK = 512


@pytest.mark.parametrize("token_ms", [0.1, 0.7, 1.5, 9.0])
@pytest.mark.parametrize("step_ms", [5.0, 27.0, 90.0])
def test_a_piece_takes_as_long_as_it_may(token_ms: float, step_ms: float) -> None:
    pace = MeasuredPieces(CHUNK)
    for _ in range(50):
        pace.wrote(step_ms)
        tokens = pace.piece(8, 256)
        pace.read(tokens, 256, tokens * token_ms)
    limit = STEPS_A_PIECE * step_ms
    assert tokens * token_ms <= limit or tokens == LEAST
    assert (tokens + 2 * LEAST) * token_ms >= limit or tokens == CHUNK


def test_a_long_prompt_begins_with_a_short_piece() -> None:
    """What short prompts took says nothing of it."""
    pace = MeasuredPieces(CHUNK)
    pace.wrote(30.0)
    pace.read(64, 256, 64 * 0.1)
    assert pace.piece(8, 256) == 448
    assert pace.piece(8, 1024) == FIRST_PIECE
    pace.read(FIRST_PIECE, 1024, FIRST_PIECE * 1.5)
    assert pace.piece(8, 1024) == 24
    assert pace.piece(8, 256) == 448


def test_slower_pieces_count_at_once_and_faster_ones_by_and_by() -> None:
    pace = MeasuredPieces(CHUNK)
    pace.wrote(30.0)
    pace.read(32, 256, 32 * 1.0)
    before = pace.piece(8, 256)
    pace.read(32, 256, 32 * 2.0)
    slower = pace.piece(8, 256)
    assert slower <= before / 2 + LEAST
    pace.read(32, 256, 32 * 1.0)
    assert slower <= pace.piece(8, 256) < before


def test_nobody_who_writes_means_whole_chunks() -> None:
    assert MeasuredPieces(CHUNK).piece(0, 256) == CHUNK
    assert WholeChunks(7).piece(8, 256) == 7
