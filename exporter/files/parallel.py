"""Worker threads: how many there are, and jobs that they run."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")
MAX_WORKERS = 4


def worker_count() -> int:
    """Number of worker threads: one for each usable core, at most :data:`MAX_WORKERS`."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def submitted(
    workers: Executor, function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]]
) -> Iterator[Iterator[Result]]:
    """Run ``function(*job)`` for every job on ``workers``; the block gets the results, in the order of the jobs.

    When the block ends, jobs that have not begun are cancelled and the running ones are awaited: no thread uses a file
    that is closed afterwards.
    """
    futures = [workers.submit(function, *job) for job in jobs]
    try:
        yield (future.result() for future in futures)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Limit torch to one thread for each operation: its threads would compete with ours for the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
