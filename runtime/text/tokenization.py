"""Between text and token ids: the artifact's tokenizer and chat template, and text that grows token by token."""

from collections.abc import Mapping, Sequence
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

    special = ordinary and not chat
    return EncodedPrompts(
        branches=[encode(tokenizer, prompt, special and not context) for prompt in prompts],
        context=encode(tokenizer, context, special) if context else None,
    )


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids; ``special`` adds those that the tokenizer puts around a text. What is too long is said by us.

    Raises:
        InputError: half characters, which no text has: something that was not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text[:40]!a} is not text in UTF-8") from None
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    return ids


def render_chat(tokenizer: Any, prompts: Sequence[str], context: str | None) -> tuple[list[str], str | None]:
    """The chat template's text of every prompt, and of the context as a system turn."""
    asked = [{"role": "user", "content": prompt} for prompt in prompts]
    if not context:
        return [template_text(tokenizer, [turn], ask=True) for turn in asked], None
    system = {"role": "system", "content": context}
    whole = [template_text(tokenizer, [system, turn], ask=True) for turn in asked]
    shared = template_text(tokenizer, [system], ask=False)
    if not all(text.startswith(shared) and len(text) > len(shared) for text in whole):
        raise InputError(
            "this chat template cannot start with the context as a system turn; use --ignore-chat-template"
        )
    return [text[len(shared) :] for text in whole], shared


def require_chat_template(tokenizer: Any) -> None:
    """Raises:
    InputError: the artifact has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the artifact has no chat template; put the base model's chat_template.jinja there, or use --mode generate"
        )


def template_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, ask: bool) -> str:
    """The chat template's text of some turns; ``ask`` opens the next one for the model.

    Raises:
        InputError: turns that the template does not take.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template raises whatever it likes
        raise InputError(f"the chat template does not take these turns: {error}") from None
    return text


class GrowingText:
    """The text of one answer, which ends before the first of ``stops``.

    A character that is still incomplete waits for its last token, and what may be the beginning of a stop for its rest.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._waiting = ""
        # Only the newest tokens are decoded: those from `_start` on, of which `_known` have been seen as text.
        self._start = self._known = 0
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def append(self, token: int) -> str:
        """Add a token and return the text that it completes."""
        self.ids.append(token)
        return self._release(self._decoded())

    def close(self) -> str:
        """The rest, even where a character stayed incomplete."""
        if self.stopped:
            return ""
        new = self._release(self._decoded(whole=False))
        rest, self._waiting = ("", "") if self.stopped else (self._waiting, "")
        self.text += rest
        return new + rest

    def _decoded(self, whole: bool = True) -> str:
        """Text of the tokens that are not known yet; nothing while its last character is not ``whole``."""
        before, now = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in self._window())
        if whole and now.endswith("\ufffd"):
            return ""
        self._start, self._known = self._known, len(self.ids)
        new: str = now[len(before) :]
        return new

    def _window(self) -> tuple[list[int], list[int]]:
        return self.ids[self._start : self._known], self.ids[self._start :]

    def _release(self, new: str) -> str:
        """What of the text is certainly no part of a stop."""
        text = self._waiting + new
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            text, self._waiting = text[: min(found)], ""
        else:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._waiting = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How much of the end of ``text`` is the beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
