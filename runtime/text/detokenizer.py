"""From token ids to text, one token at a time."""

from collections.abc import Sequence
from typing import Any

from pos2d.runtime.text.growing_text import growing_text


class StreamDetokenizer:
    """The text of one answer, which ends before the first stop string in it.

    Text is held back while its last character is incomplete, or while its end may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._growing = growing_text(tokenizer)
        self._stop = stop
        self._held_back = ""
        self.text = ""
        self.stopped = False

    def append(self, token: int) -> str:
        """Add a token; return the text that it completes.

        Text that a further token might still change is final if it completes a stop string.
        """
        text = self._release(self._growing.append(token))
        if self._stop and not self.stopped:
            end = self._held_back + self._growing.peek()
            if any(stop in end for stop in self._stop):
                text += self._release(self._growing.close())
        return text

    def close(self) -> str:
        """Return the text that was held back, with an incomplete last character as it decodes."""
        if self.stopped:
            return ""
        text = self._release(self._growing.close())
        end, self._held_back = ("", "") if self.stopped else (self._held_back, "")
        self.text += end
        return text + end

    def _release(self, new: str) -> str:
        """Add ``new`` to the text; return the part that cannot belong to a stop string."""
        text = self._held_back + new
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self.stopped = True
            text, self._held_back = text[: min(ends)], ""
        else:
            overlap = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held_back = text[: len(text) - overlap], text[len(text) - overlap :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
