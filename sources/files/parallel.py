"""Worker threads: how many there are, and jobs that they run."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from pos2d.threads import default_threads

Result = TypeVar("Result")
MAX_WORKERS = 4
_threads: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads inside the block, or with :func:`pos2d.threads.default_threads`: ours and torch's.

    The number of torch's threads holds for the whole process; it is the old one again after the block.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or min(before, default_threads()))
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)
        torch.set_num_threads(before)


def thread_limit() -> int | None:
    """The number of threads that was asked for in :func:`limited_threads`."""
    return _threads.get()


def worker_count() -> int:
    """Number of worker threads: one for each thread that may compute, at most :data:`MAX_WORKERS`."""
    return min(MAX_WORKERS, _threads.get() or default_threads())


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
