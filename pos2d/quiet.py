"""Libraries that talk on standard error, without the talk."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from pos2d.errors import UsageError


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


def bitsandbytes() -> Any:
    """Raises:
    UsageError: it is not installed, or cannot be imported here.
    """
    try:
        with quietly("bitsandbytes"):  # it looks for kernels on a model hub, and says that it found none
            return import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"bitsandbytes cannot be imported: {error}; pip install bitsandbytes") from None
