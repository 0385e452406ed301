"""From texts to token ids, with the artifact's tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.runtime.text.chat_template import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Token ids of every prompt, and of the context before them."""

    branches: list[list[int]]
    context: list[int] | None

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.branches)) + len(self.context or ())


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of an artifact.

    Raises:
        InputError: the artifact has no ``tokenizer.json``.
    """
    if not (directory / "tokenizer.json").is_file():
        raise InputError(
            f"{directory} has no tokenizer.json; put the base model's tokenizer files there, or work with token ids"
        )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], context: str | None, *, chat: bool, add_special_tokens: bool
) -> EncodedPrompts:
    """Token ids of every prompt, and of the context that all of them see.

    With ``chat`` every prompt is a user message in the chat template, and the context is the system message before it.
    Without, the texts are encoded as they are. ``add_special_tokens`` then puts the tokenizer's special tokens, such
    as BOS, at the beginning: for single and isolated sequences, but not for columns, which are trained without.

    Raises:
        InputError: no prompt, an empty one, or a template that cannot put a system message before a user's.
    """
    empty = [str(number) for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty:
        raise InputError(f"prompt {', '.join(empty)} is empty; give it some text")
    if not prompts:
        raise InputError("there is no prompt; give at least one `prompt`")
    if chat:
        prompts, context = render_chat(tokenizer, prompts, context)

    special = add_special_tokens and not chat
    return EncodedPrompts(
        branches=[encode(tokenizer, prompt, special and not context) for prompt in prompts],
        context=encode(tokenizer, context, special) if context else None,
    )


def encode(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text. Lengths are checked elsewhere, so the tokenizer's warning about them is turned off.

    Raises:
        InputError: the text has lone surrogates, which come from bytes that were not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text[:40]!a} is not text in UTF-8") from None
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return ids
