"""bitsandbytes, imported on first use, without its log messages below the level of an error."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from pos2d.errors import UsageError


@contextmanager
def errors_only() -> Iterator[None]:
    """Let bitsandbytes log errors only; its log level is restored afterwards."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def bitsandbytes() -> Any:
    """Import the library.

    Raises:
        UsageError: it is not installed, or its import fails.
    """
    try:
        with errors_only():  # it looks for kernels on a model hub, and logs that it found none
            return import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"bitsandbytes cannot be imported: {error}; pip install bitsandbytes") from None
