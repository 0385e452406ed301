"""The import of bitsandbytes, which only its own formats need."""

import logging
from functools import cache
from importlib import import_module
from typing import Any

from pos2d.errors import UsageError


@cache
def bitsandbytes() -> Any:
    """Import bitsandbytes, with its logging silenced below errors meanwhile.

    Raises:
        UsageError: it is not installed, or cannot be imported here.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it looks for kernels on a model hub, and warns where it finds none
    try:
        return import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"bitsandbytes cannot be imported: {error}; pip install bitsandbytes") from None
    finally:
        logger.setLevel(level)
