"""Messages of a conversation: a role, and a content that is a text or a list of text parts."""

from collections.abc import Mapping, Sequence
from typing import Any

from pos2d.errors import InputError

# What other programs call a part of a message that is text.
TEXT_PARTS = ("text", "input_text", "output_text")


def text_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of ``messages`` with one text as the content of each; other keys stay as they are.

    Raises:
        InputError: not a list of messages, each with a role and a content that is text.
    """
    turns = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else [messages]
    return [_text_message(turn) for turn in turns]


def _text_message(turn: Any) -> dict[str, Any]:
    if isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
        text = content_text(turn.get("content"))
        if text is not None:
            return {**turn, "content": text}
    raise InputError(f"{turn!r} is not a turn; each has a role and a content, both texts")


def content_text(content: Any) -> str | None:
    """The text of a message's content, or None if it is neither a text nor a list of parts.

    Several parts, ``[{"type": "text", "text": ...}, ...]``, are put on lines of their own.

    Raises:
        InputError: a part that is no text, such as an image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        return None
    for part in content:
        if not (
            isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(f"a message has a part {kind!r}; only parts with type 'text' and a text can be read")
    return "\n".join(part["text"] for part in content)
