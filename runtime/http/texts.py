"""From the messages and texts of requests to token ids."""

from collections.abc import Sequence
from typing import Any

from pos2d.errors import InputError
from pos2d.messages import text_messages
from pos2d.runtime.http.schemas.chat import Message
from pos2d.runtime.http.schemas.responses import InputMessage
from pos2d.runtime.text.tokenization import EncodedPrompts, encode, encode_longer, encode_text, share_context

# A text with fewer characters for each position is encoded at once.
CHARACTERS = 4


def turns(messages: Sequence[Message | InputMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates know them; a developer's message is the system's."""
    named = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content
            if isinstance(message.content, str)
            else [{"type": "text", "text": part.text} for part in message.content],
        }
        for message in messages
    ]
    return text_messages(named)


def check_text(tokenizer: Any, text: str, positions: int) -> None:
    """Check a long text before all of it is encoded: its beginnings must not have far too many tokens already.

    Raises:
        InputError: it has more than ``positions`` tokens.
    """
    size = CHARACTERS * positions
    while len(text) > size:
        # The last word of a beginning may have more tokens than it has in the text, hence the double.
        if len(encode(tokenizer, text[:size])) > 2 * positions:
            raise _too_long(f"more than {positions}", positions)
        size *= 2


def check_ids(ids: Sequence[int], positions: int) -> None:
    """Check the length of a prompt before it is laid out.

    Raises:
        InputError: it has more than ``positions`` tokens.
    """
    if len(ids) > positions:
        raise _too_long(str(len(ids)), positions)


def _too_long(tokens: str, positions: int) -> InputError:
    return InputError(f"the prompt has {tokens} tokens, the model has {positions} positions; shorten it")


def encode_questions(tokenizer: Any, texts: Sequence[str], shared: str) -> EncodedPrompts:
    """Token ids of rendered questions that all begin with ``shared``."""
    if not shared:
        return share_context((encode(tokenizer, text) for text in texts), [])
    known = encode_text(tokenizer, shared)
    return share_context((encode_longer(tokenizer, text, known) for text in texts), known.ids)


def encode_plain(tokenizer: Any, text: str, positions: int, *, special: bool = True) -> list[int]:
    """Token ids of a text as it is, after the tokenizer's special tokens.

    Raises:
        InputError: it has no token, or more than ``positions``.
    """
    check_text(tokenizer, text, positions)
    ids = encode(tokenizer, text, special)
    check_ids(ids, positions)
    if not ids:
        raise InputError("the prompt is empty; give it some text")
    return ids
