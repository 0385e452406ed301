"""Threads that share the cores among themselves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

MAX_WORKERS = 4


def worker_count() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """torch's own threads would only get in the way of ours."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
