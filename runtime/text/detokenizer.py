"""From token ids to text, one token at a time."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete character to


class StreamDetokenizer:
    """The text of one answer, which ends before the first stop string in it.

    Text is held back while its last character is incomplete, or while its end may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._held_back = ""
        # A token is decoded together with the token before it, since its text may depend on that. Decoding starts at
        # `_window`; the text of the tokens before `_decoded` is out already.
        self._window = self._decoded = 0
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def append(self, token: int) -> str:
        """Add a token; return the text that it completes."""
        self.ids.append(token)
        return self._release(self._decode())

    def close(self) -> str:
        """Return the text that was held back, with an incomplete last character as it decodes."""
        if self.stopped:
            return ""
        text = self._release(self._decode(allow_incomplete=True))
        end, self._held_back = ("", "") if self.stopped else (self._held_back, "")
        self.text += end
        return text + end

    def _decode(self, allow_incomplete: bool = False) -> str:
        """Text of the tokens that are not decoded yet; empty while their last character is incomplete."""
        windows = self.ids[self._window : self._decoded], self.ids[self._window :]
        before, after = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in windows)
        if after.endswith(REPLACEMENT) and not allow_incomplete:
            return ""
        self._window, self._decoded = self._decoded, len(self.ids)
        new: str = after[len(before) :]
        return new

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
