"""From the messages and texts of requests to token ids. All of it runs in one thread beside the event loop."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pos2d.errors import InputError
from pos2d.messages import text_messages
from pos2d.runtime.http.schemas.chat import Message
from pos2d.runtime.http.schemas.responses import InputMessage
from pos2d.runtime.text.chat_template import render_for_answer, render_messages, render_questions
from pos2d.runtime.text.tokenization import EncodedPrompts, encode, encode_longer, encode_text, share_context

Messages = Sequence[Mapping[str, Any]]
Arguments = Mapping[str, Any] | None


class Renderer(Protocol):
    """Renders messages with the artifact's chat template; raises InputError where the template does not accept them."""

    def answer(self, messages: Messages, arguments: Arguments) -> str:
        """The text that an answer follows; a last message of the assistant is continued."""

    def questions(self, messages: Messages, questions: Sequence[str], arguments: Arguments) -> tuple[list[str], str]:
        """The text of every question after ``messages``, and the beginning that they share."""

    def whole(self, messages: Messages, arguments: Arguments) -> str:
        """The text of ``messages`` alone."""


class DirectRenderer:
    """Renders in the calling thread, without a limit of time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def answer(self, messages: Messages, arguments: Arguments) -> str:
        return render_for_answer(self._tokenizer, messages, arguments)

    def questions(self, messages: Messages, questions: Sequence[str], arguments: Arguments) -> tuple[list[str], str]:
        return render_questions(self._tokenizer, messages, questions, arguments)

    def whole(self, messages: Messages, arguments: Arguments) -> str:
        return render_messages(self._tokenizer, messages, arguments, add_generation_prompt=False)


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


def encode_questions(tokenizer: Any, texts: Sequence[str], shared: str) -> EncodedPrompts:
    """Token ids of rendered questions that all begin with ``shared``."""
    if not shared:
        return share_context((encode(tokenizer, text) for text in texts), [])
    known = encode_text(tokenizer, shared)
    return share_context((encode_longer(tokenizer, text, known) for text in texts), known.ids)


def encode_plain(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text as it is, after the tokenizer's special tokens.

    Raises:
        InputError: it has no token.
    """
    ids = encode(tokenizer, text, special)
    if not ids:
        raise InputError("the prompt is empty; give it some text")
    return ids
