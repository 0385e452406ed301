"""From texts to token ids, with the artifact's tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.runtime.engine.common_prefix import common_length
from pos2d.runtime.text.chat_template import render_chat

__all__ = [
    "EncodedPrompts",
    "EncodedText",
    "encode",
    "encode_longer",
    "encode_prompts",
    "encode_text",
    "load_tokenizer",
    "share_context",
]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Token ids of every prompt, and of the context before them.

    ``whole_context`` is the context's text by itself. ``context`` is without the last tokens of it where these reach
    into a prompt.
    """

    branches: list[list[int]]
    context: list[int] | None
    whole_context: list[int] | None = None

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
    if not shared or (add_special_tokens and not chat):
        wholes = (encode(tokenizer, text, add_special_tokens and not chat) for text in texts)
        return share_context(wholes, encode(tokenizer, shared, True) if shared else [])
    known = encode_text(tokenizer, shared)
    return share_context((encode_longer(tokenizer, text, known) for text in texts), known.ids)


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
    own_ids = [context[shared:same] + own for same, own in branches]
    return EncodedPrompts(own_ids, context[:shared] or None, context or None)


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text and its token ids, of which those before ``cut`` are the same in every text that begins with this one.

    ``cut`` is the last special token, if any, and ``offset`` is the place of that token in the text: tokenizers encode
    what stands between special tokens by itself.
    """

    text: str
    ids: list[int]
    cut: int = 0
    offset: int = 0


def encode_text(tokenizer: Any, text: str, known: EncodedText | None = None) -> EncodedText:
    """Encode ``text``, which is ``known`` continued; only what follows the last special token is encoded again.

    Raises:
        InputError: as :func:`encode`.
    """
    known = known or EncodedText("", [])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return EncodedText(text, encode_longer(tokenizer, text, known))
    end = text[known.offset :]
    _check_utf8(end)
    encoded = tokenizer(end, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    added = backend.get_added_tokens_decoder()
    cuts = {token: facts.content for token, facts in added.items() if facts.special and not facts.normalized}
    cut, offset = known.cut, known.offset
    for place in range(len(encoded.input_ids) - 1, 0, -1):
        content, start = cuts.get(encoded.input_ids[place]), encoded.offset_mapping[place][0]
        # The token for what is unknown stands in place of other texts, too.
        if content and end.startswith(content, start):
            cut, offset = known.cut + place, known.offset + start
            break
    return EncodedText(text, known.ids[: known.cut] + encoded.input_ids, cut, offset)


def encode_longer(tokenizer: Any, text: str, known: EncodedText) -> list[int]:
    """Token ids of ``text``, which is ``known`` continued.

    Raises:
        InputError: as :func:`encode`.
    """
    return known.ids[: known.cut] + encode(tokenizer, text[known.offset :])


def encode(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text. Lengths are checked elsewhere, so the tokenizer's warning about them is turned off.

    Raises:
        InputError: the text has lone surrogates, which come from bytes that were not UTF-8.
    """
    _check_utf8(text)
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return ids


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text[:40]!a} is not text in UTF-8") from None
