"""Rendering messages with the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from pos2d.errors import InputError


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """The text of ``messages``; ``add_generation_prompt`` opens the assistant's message after them.

    Raises:
        InputError: the template does not accept these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template may raise anything
        raise InputError(f"the chat template does not accept these messages: {error}") from None
    return text


def render_chat(tokenizer: Any, prompts: Sequence[str], context: str | None) -> tuple[list[str], str | None]:
    """The text of every prompt as a user message, and of the context as the system message before them.

    Raises:
        InputError: the template does not render the system message as a prefix of the whole chat.
    """
    users = [{"role": "user", "content": prompt} for prompt in prompts]
    if not context:
        return [render_messages(tokenizer, [user], add_generation_prompt=True) for user in users], None
    system = {"role": "system", "content": context}
    chats = [render_messages(tokenizer, [system, user], add_generation_prompt=True) for user in users]
    prefix = render_messages(tokenizer, [system], add_generation_prompt=False)
    prompts_after = split_prefix(chats, prefix)
    if prompts_after is None:
        raise InputError(
            "this chat template cannot start with the context as a system message; use `ignore_chat_template=True`"
        )
    return prompts_after, prefix


def split_prefix(texts: Sequence[str], prefix: str) -> list[str] | None:
    """Every text after ``prefix``, or None if one of them does not continue it."""
    if not all(text.startswith(prefix) and len(text) > len(prefix) for text in texts):
        return None
    return [text[len(prefix) :] for text in texts]


def require_chat_template(tokenizer: Any) -> None:
    """Check that there is a chat template.

    Raises:
        InputError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the artifact has no chat template; put the base model's chat_template.jinja there, or give single "
            "prompts instead of a conversation"
        )
