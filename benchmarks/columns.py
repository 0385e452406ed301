"""How long our engine decodes, for the benchmarks that compare it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pos2d import runtime

Ids = list[list[int]]
# Seconds of decoding so many columns after prompts.
Timed = Callable[[Ids, int], float]


def our_engine(artifact: Path, **flags: Any) -> Timed:
    """From the first column to the last, all prompts side by side."""
    model = runtime.load(artifact, **flags)

    def timed(prompts: Ids, new_tokens: int) -> float:
        columns = model.stream_ids(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        next(columns)
        started = time.perf_counter()
        for _ in columns:
            pass
        return time.perf_counter() - started

    return timed
