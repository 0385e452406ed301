"""The text of an answer, as its tokens arrive.

It is what ``tokenizer.decode`` makes of all tokens of the answer with ``skip_special_tokens=True`` and
``clean_up_tokenization_spaces=False``; what has been returned so far is always a beginning of it. ``DecodeStream`` of
the library ``tokenizers`` is not used, since it raises an error where bytes make no character.
"""

import codecs
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

REPLACEMENT = "\ufffd"  # what a tokenizer decodes bytes to that are no character
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Decode = Callable[[list[int]], str]


class GrowingText(Protocol):
    """Returns new text as soon as no further token can change it."""

    def append(self, token: int) -> str:
        """Add a token of the answer; return the text that it completes."""
        ...

    def peek(self) -> str:
        """The text that is held back, as it decodes without further tokens."""
        ...

    def close(self) -> str:
        """Return the text that was held back."""
        ...


def growing_text(tokenizer: Any) -> GrowingText:
    """An empty text of ``tokenizer``, one of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        special = set(tokenizer.all_special_ids)
        decode = tokenizer.decode
        return WindowedText(
            lambda ids: decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            lambda token: None if token in special else "",
        )
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}

    def token_text(token: int) -> str | None:
        text: str | None = None if token in special else backend.id_to_token(token)
        return text

    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    if state.get("type") == "ByteLevel":
        return ByteLevelText(token_text)
    has_bytes = any(decoder.get("type") == "ByteFallback" for decoder in (state, *state.get("decoders", ())))
    return WindowedText(lambda ids: backend.decode(ids, skip_special_tokens=False), token_text, has_bytes)


class ByteLevelText:
    """Text of a byte-level tokenizer, every token of which is some bytes of UTF-8.

    ``token_text`` gives a token's entry in the vocabulary, and None for a token that is not shown.
    """

    def __init__(self, token_text: Callable[[int], str | None]) -> None:
        self._token_text = token_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def append(self, token: int) -> str:
        text = self._token_text(token)
        return "" if text is None else self._utf8.decode(bytes_of_entry(text))

    def peek(self) -> str:
        return REPLACEMENT if self._utf8.getstate()[0] else ""

    def close(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowedText:
    """Text of any other tokenizer: new tokens are decoded together with the tokens before them.

    The text of a token may depend on the token before it: the first one of a text loses its space, for instance. With
    ``has_bytes``, tokens such as ``<0xE2>`` are bytes. A run of them is decoded as one: it is either all characters, or
    each of its bytes is a replacement character. A run is therefore held back until it ends or cannot be characters.
    """

    def __init__(self, decode: Decode, token_text: Callable[[int], str | None], has_bytes: bool = False) -> None:
        self._decode, self._token_text, self._has_bytes = decode, token_text, has_bytes
        self._before: list[int] = []
        self._new: list[int] = []
        self._run = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_broken = False

    def append(self, token: int) -> str:
        text = self._token_text(token)
        if text is None:
            return ""
        byte = BYTE_TOKEN.fullmatch(text) if self._has_bytes else None
        if byte:
            return self._append_byte(token, bytes.fromhex(byte[1]))
        self._run.reset()
        self._is_broken = False
        self._new.append(token)
        return "" if self._is_incomplete() else self.close()

    def peek(self) -> str:
        if not self._new:
            return ""
        before = self._decode(self._before) if self._before else ""
        return self._decode([*self._before, *self._new])[len(before) :]

    def close(self) -> str:
        text = self.peek()
        if self._new:
            self._before, self._new = self._new, []
        return text

    def _append_byte(self, token: int, byte: bytes) -> str:
        self._new.append(token)
        if not self._is_broken:
            try:
                self._run.decode(byte)
                return ""
            except UnicodeDecodeError:
                self._is_broken = True
        text = REPLACEMENT * len(self._new)
        self._before, self._new = [token], []
        return text

    def _is_incomplete(self) -> bool:
        """Whether the new tokens seem to end within a character, for decoders of which nothing else is known.

        Long rows of them are decoded ever more rarely, so that the time stays linear.
        """
        if self._has_bytes:
            return False
        count = len(self._new)
        return (count > 8 and count & (count - 1) > 0) or self.peek().endswith(REPLACEMENT)


def bytes_of_entry(text: str) -> bytes:
    """The bytes that an entry of a byte-level vocabulary stands for; another text, as added tokens have, is UTF-8."""
    table = _byte_of_letter()
    try:
        return bytes(table[letter] for letter in text)
    except KeyError:
        return text.encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
