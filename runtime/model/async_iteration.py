"""Generation in a thread, heard in an event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def iterate_in(worker: ThreadPoolExecutor, make: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """What an iterator yields that is made and driven in ``worker``.

    When the listener leaves, by ``break``, an exception or cancellation, the iterator is closed after the item at hand.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[T | None] = asyncio.Queue()
    left = threading.Event()

    def drive() -> None:
        try:
            for item in make():
                if left.is_set():
                    return
                loop.call_soon_threadsafe(items.put_nowait, item)
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(items.put_nowait, None)

    driven = loop.run_in_executor(worker, drive)
    try:
        while (item := await items.get()) is not None:
            yield item
        await driven  # raises what went wrong there
    finally:
        left.set()
