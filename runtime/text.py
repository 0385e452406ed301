"""Between text and token ids: the artifact's tokenizer and chat template, and text that grows token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    branches: list[list[int]]
    context: list[int] | None


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Raises:
    InputError: the artifact has no ``tokenizer.json``.
    """
    if not (directory / "tokenizer.json").is_file():
        raise InputError(
            f"{directory} has no tokenizer.json; put the base model's tokenizer files there, or work with token ids"
        )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], context: str | None, *, chat: bool, ordinary: bool
) -> EncodedPrompts:
    """Token ids of every prompt, and of the context that all of them see.

    With ``chat`` every prompt is a user's turn in the chat template and the context is the system's turn before it.
    Without, texts are taken as they are; ``ordinary`` sequences (one prompt, or isolated ones) start with the
    tokenizer's own special tokens, columns do not: the trainer lays them out without.

    Raises:
        InputError: no prompt, an empty one, or a template that cannot put a system turn before a user's.
    """
    empty = [str(number) for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if not prompts or empty:
        raise InputError(
            f"prompt {', '.join(empty)} is empty; give it some text" if empty else "there is no prompt; give --prompt"
        )
    if chat:
        prompts, context = render_chat(tokenizer, prompts, context)

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
        return ids

    special = ordinary and not chat
    return EncodedPrompts(
        branches=[encode(prompt, special and not context) for prompt in prompts],
        context=encode(context, special) if context else None,
    )


def render_chat(tokenizer: Any, prompts: Sequence[str], context: str | None) -> tuple[list[str], str | None]:
    """The chat template's text of every prompt, and of the context as a system turn."""

    def render(messages: list[dict[str, str]], ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return text

    if not context:
        return [render([{"role": "user", "content": prompt}], True) for prompt in prompts], None
    system = {"role": "system", "content": context}
    whole = [render([system, {"role": "user", "content": prompt}], True) for prompt in prompts]
    shared = render([system], False)
    if not all(text.startswith(shared) and len(text) > len(shared) for text in whole):
        raise InputError(
            "this chat template cannot start with the context as a system turn; use --ignore-chat-template"
        )
    return [text[len(shared) :] for text in whole], shared


class GrowingText:
    """The text of one branch; a character that is still incomplete waits for its last token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""

    def append(self, token: int) -> str:
        """Add a token and return the text that it completes."""
        self.ids.append(token)
        whole = self._decoded()
        return "" if whole.endswith("\ufffd") else self._grow(whole)

    def close(self) -> str:
        """The rest, even where a character stayed incomplete."""
        return self._grow(self._decoded())

    def _decoded(self) -> str:
        whole: str = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        return whole

    def _grow(self, whole: str) -> str:
        new, self.text = whole[len(self.text) :], whole
        return new
