"""Several values that unpack into as many as the caller names."""

import dis
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, overload


class Loaded(Sequence[Any]):
    """A model, its tokenizer, and whether its positions are 2D: a sequence of three that unpacks into two as well.

    Programs for the trainer's script have both forms, and its guide prints both.
    """

    def __init__(self, model: Any, tokenizer: Any, patch_rope: bool) -> None:
        self._values = (model, tokenizer, patch_rope)

    def __iter__(self) -> Iterator[Any]:
        # A plain method, not a generator: only so is the frame that unpacks the one below this call.
        return iter(self._values[:2] if _targets(sys._getframe(1)) == 2 else self._values)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def _targets(frame: FrameType) -> int | None:
    """How many names ``frame`` is unpacking into at this moment; nothing where it does something else.

    Nobody passes that number on, but it stands in the instruction that is being run. ``dis`` reads the code as it was
    compiled, whatever faster form the interpreter has put in its place, and adds up arguments of more than a byte.
    """
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.arg if instruction.opname == "UNPACK_SEQUENCE" else None
    return None
