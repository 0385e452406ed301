"""The text and the bytes of a single token, for log probabilities."""

import json
from functools import lru_cache
from typing import Any

from pos2d.runtime.text.growing_text import BYTE_TOKEN, bytes_of_entry, growing_text

FLOOR = -9999.0  # OpenAI's number in place of minus infinity, which JSON does not have


class TokenTexts:
    """Texts of the tokens of one tokenizer, special tokens included; each is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        self._is_byte_level = decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def shown(self, token: int) -> str:
        """The text of a token; bytes that are no character are replacement characters."""
        return self.bytes_of(token).decode(errors="replace")

    def exact(self, token: int) -> str:
        """The text of a token, or ``bytes:`` and its bytes where it is no whole character, as OpenAI writes it."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, token: int) -> bytes:
        if token in self._special:
            return str(self._special[token]).encode()
        entry = self._tokenizer.convert_ids_to_tokens(token)
        if entry is None:
            return b""
        if self._is_byte_level:
            return bytes_of_entry(entry)
        byte = BYTE_TOKEN.fullmatch(entry)
        if byte:
            return bytes.fromhex(byte[1])
        # After another token, since the first one of a text may lose its space.
        text = growing_text(self._tokenizer)
        text.append(token)
        text.close()
        return (text.append(token) + text.close()).encode()


def json_number(logprob: float) -> float:
    """A log probability as JSON can have it."""
    return max(float(logprob), FLOOR)
