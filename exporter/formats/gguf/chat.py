"""A chat template in Ollama's language, found from what the model's own template renders.

Ollama has templates of Go's ``text/template`` in place of Jinja. A Jinja template is a program, but nearly all of them
write the messages one after another, with fixed texts between them. These texts are found by rendering a conversation
whose contents are known. What they make of other conversations is then compared with the template itself, and a
template that does something else has no translation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = Sequence[Mapping[str, str]]
# Contents that a template neither has nor changes.
ASKED, ANSWERED, SYSTEM = ("Qone1", "Qtwo2", "Qthree3"), ("Aone1", "Atwo2"), "Sys0"
# With this, a template writes another text tomorrow.
CLOCK = "strftime_now"


@dataclass(frozen=True, slots=True)
class ChatTexts:
    """The texts between the messages of a chat, in which a question and an answer take turns.

    ``opening`` is before the first question without a system message, ``system`` before and after a system message in
    its place; None where the template takes none. ``with_last``: the system message stands before the last question
    instead, and ``system`` is around it there. ``answer`` is after a question before its answer, ``question`` between
    an answer and the next question, ``prompt`` after the last question.
    """

    opening: str
    system: tuple[str, str] | None
    with_last: bool
    answer: str
    question: str
    prompt: str

    def render(self, messages: Messages) -> str:
        """The text that an answer to ``messages`` follows; what :attr:`go_template` writes."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [message for message in messages if message["role"] != "system"]
        around = self.system or ("", "")
        stated = around[0] + system + around[1] if self.system and system else ""
        text = stated if stated and not self.with_last else self.opening
        for number, turn in enumerate(turns):
            is_last = number == len(turns) - 1
            if turn["role"] == "user":
                text += self.question if number else ""
                text += stated if self.with_last and is_last else ""
                text += turn["content"] + (self.prompt if is_last else "")
            else:
                text += self.answer + turn["content"]
        return text

    def without_first(self, token: str) -> "ChatTexts":
        """The same, without ``token`` at the very beginning, which Ollama puts there itself."""
        system = self.system
        if system is not None and not self.with_last:
            system = (system[0].removeprefix(token), system[1])
        return replace(self, opening=self.opening.removeprefix(token), system=system)

    @property
    def go_template(self) -> str:
        """The template for Ollama. All fixed texts are Go strings, so that no white space is lost around actions."""
        around = self.system or ("", "")
        stated = f"{_go(around[0])}{{{{ .System }}}}{_go(around[1])}"
        opening = _go(self.opening)
        if self.system and not self.with_last:
            opening = f"{{{{ if .System }}}}{stated}{{{{ else }}}}{opening}{{{{ end }}}}"
        last = ""
        if self.system and self.with_last:
            last = f"{{{{ if and $last $.System }}}}{stated.replace(' .System', ' $.System')}{{{{ end }}}}"
        asked = f"{{{{ if $asked }}}}{_go(self.question)}{{{{ end }}}}{last}{{{{ .Content }}}}"
        lines = [
            f"{opening}{{{{ $asked := false }}}}{{{{ range $i, $_ := .Messages }}}}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            f'{{{{- if eq .Role "user" }}}}{asked}',
            f"{{{{- $asked = true }}}}{{{{ if $last }}}}{_go(self.prompt)}{{{{ end }}}}",
            f'{{{{- else if eq .Role "assistant" }}}}{_go(self.answer)}{{{{ .Content }}}}{{{{ end }}}}',
            "{{- end }}",
        ]
        return "\n".join(lines)


def chat_texts(tokenizer: "PreTrainedTokenizerFast") -> tuple[ChatTexts | None, str]:
    """The texts of a tokenizer's chat template, or None and the reason, in words."""
    if not tokenizer.chat_template:
        return None, "the model has no chat template"
    try:
        if CLOCK in str(tokenizer.get_chat_template()):
            return None, "the chat template writes the date"
        found = _found(tokenizer)
    except Exception:  # a template may raise anything
        return None, "the chat template does not take a question, an answer and a further question"
    if found is None or any(_render(tokenizer, messages) != found.render(messages) for messages in _samples(found)):
        return None, "the chat template does more than write messages one after another"
    return found, ""


def _found(tokenizer: "PreTrainedTokenizerFast") -> ChatTexts | None:
    plain = _split(_render(tokenizer, _conversation(2)), [ASKED[0], ANSWERED[0], ASKED[1]])
    if plain is None:
        return None
    opening, answer, question, prompt = plain
    found = ChatTexts(opening, None, False, answer, question, prompt)
    try:
        text = _render(tokenizer, _conversation(2, system=True))
    except Exception:  # a template may refuse system messages
        return found
    if SYSTEM not in text:
        return found
    first = _split(text, [SYSTEM, *ASKED[:1]])
    if first is not None and ANSWERED[0] not in "".join(first[:2]):
        return replace(found, system=(first[0], first[1]))
    last = _split(text, [ANSWERED[0], SYSTEM, ASKED[1]])
    if last is None or not last[1].startswith(question):
        return None
    return replace(found, system=(last[1].removeprefix(question), last[2]), with_last=True)


def _samples(found: ChatTexts) -> list[list[dict[str, str]]]:
    """Conversations on which the translation is compared with the template."""
    with_system = [False] if found.system is None else [False, True]
    return [_conversation(turns, system=system) for turns in (1, 2, 3) for system in with_system]


def _conversation(questions: int, system: bool = False) -> list[dict[str, str]]:
    """This many questions, with answers between them."""
    turns = [{"role": "system", "content": SYSTEM}] if system else []
    for number in range(questions):
        turns.append({"role": "user", "content": ASKED[number]})
        if number < questions - 1:
            turns.append({"role": "assistant", "content": ANSWERED[number]})
    return turns


def _render(tokenizer: "PreTrainedTokenizerFast", messages: Messages) -> str:
    arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    return str(tokenizer.apply_chat_template(list(messages), **arguments))


def _split(text: str, contents: Sequence[str]) -> list[str] | None:
    """The texts around ``contents``, each of which is there once and in this order; None if that is not so."""
    if any(text.count(content) != 1 for content in contents):
        return None
    match = re.fullmatch("(.*)".join(["", *map(re.escape, contents), ""]), text, re.DOTALL)
    return None if match is None else list(match.groups())


def _go(text: str) -> str:
    """An action of a Go template that writes ``text``; nothing for an empty text."""
    if not text:
        return ""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{{{{ "{"".join(_go_character(character) for character in quoted)}" }}}}'


def _go_character(character: str) -> str:
    escapes = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return escapes.get(character, character if character.isprintable() else f"\\U{ord(character):08x}")
