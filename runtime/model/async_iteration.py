"""Iterating over a blocking iterator from an event loop, with the work in a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def iterate_in(worker: ThreadPoolExecutor, make: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """The items of an iterator that ``make`` creates; both run in ``worker``.

    If the reader leaves early, by ``break``, an exception or cancellation, the iterator stops after its current item.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[T | None] = asyncio.Queue()
    reader_left = threading.Event()

    def drive() -> None:
        try:
            for item in make():
                if reader_left.is_set():
                    return
                loop.call_soon_threadsafe(items.put_nowait, item)
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(items.put_nowait, None)

    driven = loop.run_in_executor(worker, drive)
    try:
        while (item := await items.get()) is not None:
            yield item
        await driven  # raises the error that ended the iterator, if one did
    finally:
        reader_left.set()
