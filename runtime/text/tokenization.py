"""From texts to token ids, with the artifact's tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.runtime.text.chat_template import render_chat
from pos2d.runtime.text.common_prefix import common_length

__all__ = ["EncodedPrompts", "encode", "encode_prompts", "load_tokenizer", "share_context"]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Token ids of every prompt, and of the context before them."""

    branches: list[list[int]]
    context: list[int] | None

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.branches)) + len(self.context or ())


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    context: str | None,
    *,
    chat: bool,
    add_special_tokens: bool,
    template_arguments: Mapping[str, Any] | None = None,
) -> EncodedPrompts:
    """Token ids of every prompt, and of the context that all of them see.

    The context and a prompt together have the tokens of their whole text. With ``chat`` every prompt is a user message
    in the chat template, and the context is the system message before it. Without, the texts are encoded as they are.
    ``add_special_tokens`` then puts the tokenizer's special tokens, such as BOS, at the beginning: for single and
    isolated sequences, but not for columns, which are trained without.

    Raises:
        InputError: no prompt, an empty one, or a template that cannot put a system message before a user's.
    """
    empty = [str(number) for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty:
        raise InputError(f"prompt {', '.join(empty)} is empty; give it some text")
    if not prompts:
        raise InputError("there is no prompt; give at least one `prompt`")
    if chat:
        texts, shared = render_chat(tokenizer, prompts, context, template_arguments)
    else:
        shared = context or ""
        texts = [shared + prompt for prompt in prompts]
    special = add_special_tokens and not chat
    wholes = (encode(tokenizer, text, special) for text in texts)
    return share_context(wholes, encode(tokenizer, shared, special) if shared else [])


def share_context(wholes: Iterable[list[int]], context: list[int]) -> EncodedPrompts:
    """Take the beginning that all of ``wholes`` have in common with ``context`` out of them, as their context.

    A token that reaches from the context's text into a prompt's belongs to the branches, and so does at least one
    token of each.
    """
    branches: list[tuple[int, list[int]]] = []
    for ids in wholes:
        same = common_length(context, ids[:-1])
        branches.append((same, ids[same:]))
    shared = min(same for same, _ in branches)
    return EncodedPrompts([context[shared:same] + own for same, own in branches], context[:shared] or None)


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
