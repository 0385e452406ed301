"""The types that weights are written in and computed with, by torch's names."""

from pos2d.errors import UsageError

DTYPES = ("float32", "float16", "bfloat16")


def check_dtype(dtype: str) -> None:
    """Raises:
    UsageError: neither ``auto`` nor one of them.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
