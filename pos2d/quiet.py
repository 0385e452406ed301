"""Libraries that talk on standard error, without the talk."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly(logger: str) -> Iterator[None]:
    """Only errors of a library; its setting is afterwards what it was."""
    talking = logging.getLogger(logger)
    level = talking.level
    talking.setLevel(logging.ERROR)
    try:
        yield
    finally:
        talking.setLevel(level)
