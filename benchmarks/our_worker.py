"""Our runtime as a worker beside the peers: the same requests, answered with an artifact."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from peer_worker import serve


class Ours:
    """Answers stand side by side behind their prompt, which is their context but for its last token."""

    def __init__(self, artifact: Path) -> None:
        from pos2d import runtime

        self._model = runtime.load(artifact)

    def answer(self, prompt: list[int], answers: int, new: int) -> tuple[float, float]:
        *context, last = prompt
        started = time.perf_counter()
        columns = self._model.stream_ids(
            [[last]] * answers, context, max_new_tokens=new, ignore_eos=True, visibility="isolated"
        )
        next(columns)
        first = time.perf_counter() - started
        for _ in columns:
            pass
        return first, time.perf_counter() - started

    def logits(self, ids: list[int]) -> Any:
        return self._model.logits(ids)[0]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("artifact", type=Path)
    given = arguments.parse_args()
    # The code that this file belongs to, and not another that is installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    serve(("runtime", "onnxruntime"), lambda: Ours(given.artifact))


if __name__ == "__main__":
    main()
