"""A conversation whose cache stays from turn to turn, and questions that branch off it."""

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import build_layout
from pos2d.runtime.engine.prefix_cache import Prefix
from pos2d.runtime.engine.sampling import SamplingFlags, resolve_sampling
from pos2d.runtime.flags import check_known, part_of
from pos2d.runtime.text.completions import Event, answer
from pos2d.runtime.text.requests import GenerationFlags, check_heeded, chosen_spec, group_size, lay_out, stream
from pos2d.runtime.text.tokenization import EncodedPrompts, encode, require_chat_template, template_text

if TYPE_CHECKING:
    from pos2d.runtime.model.model import Model

Message = dict[str, str]


class Conversation:
    """``messages`` are the turns so far; an answer is added with its question, also when it was interrupted.

    A turn reads only what is new: the tokens of an answer stay as they were written, whatever the tokenizer would make
    of its text.
    """

    def __init__(self, model: "Model", messages: Sequence[Mapping[str, str]], options: GenerationFlags) -> None:
        check_known(GenerationFlags, options)
        if options.get("ignore_chat_template"):
            raise UsageError("a conversation goes through the chat template; leave ignore_chat_template out")
        require_chat_template(model.tokenizer)
        check_heeded(model.manifest.rope_2d, options)
        self._model = model
        self._spec = chosen_spec(model.manifest.rope_2d, options)
        self._group_size = group_size(options)
        self._sampling = resolve_sampling(model.path, part_of(SamplingFlags, options))
        self._prefix = Prefix(model.backend, self._spec, model.manifest.context_length)
        # Texts of the conversation up to the end of each answer's turn, the last one first, and the tokens of that.
        self._known: list[tuple[str, list[int]]] = []
        self._open: Generator[Event] | None = None
        self.messages: list[Message] = _messages(messages)

    @property
    def tokens_read(self) -> int:
        """Tokens that were encoded as prompts in all turns together."""
        return self._prefix.tokens_read

    def ask(self, question: str | Mapping[str, str]) -> Generator[Event]:
        """The answer to the user's next turn, token by token.

        Raises:
            InputError: an empty question, messages that the chat template does not take, or no room in the context.
        """
        self._end_open_turn()
        (asked,) = _messages([{"role": "user", "content": question} if isinstance(question, str) else question])
        if asked["role"] != "user":
            raise InputError(f"the next turn is the user's, not one of {asked['role']!r}")
        if not asked["content"].strip():
            raise InputError("the question is empty; give it some text")
        text = template_text(self._model.tokenizer, [*self.messages, asked], ask=True)
        ids = self._encode(text)
        limit = self._model.manifest.context_length
        if len(ids) > limit:
            raise InputError(f"the conversation takes {len(ids)} positions, the model has {limit}; begin a new one")
        self._model.check_ids(np.array(ids))
        layout = build_layout([ids], self._spec)

        def answered() -> Generator[Event]:
            start = self._prefix.keep(ids[:-1])  # the last token must be read to know what follows
            heard: list[Event] = []
            try:
                for event in answer(self._model, layout, [self._sampling], [(self._turn,)], self._prefix.cache, start):
                    if not heard:
                        self._prefix.went_on(ids, start)
                    heard.append(event)
                    yield event
            finally:
                if heard:
                    self._remember(asked, text, ids, heard)

        self._open = answered()
        return self._open

    def ask_branches(self, questions: str | Sequence[str]) -> Generator[Event]:
        """Answers to several questions side by side, each as the next turn; the conversation stays as it is.

        Raises:
            InputError: as :meth:`ask`.
        """
        self._end_open_turn()
        several = [questions] if isinstance(questions, str) else questions
        if not all(question.strip() for question in several):
            raise InputError("a question is empty; give it some text")
        asked = [[*self.messages, {"role": "user", "content": question}] for question in several]
        texts = [template_text(self._model.tokenizer, messages, ask=True) for messages in asked]
        shared = template_text(self._model.tokenizer, self.messages, ask=False) if self.messages else ""
        if not texts or not all(text.startswith(shared) and len(text) > len(shared) for text in texts):
            raise InputError("this chat template does not let several questions follow a conversation; ask one by one")
        encoded = EncodedPrompts(
            branches=[encode(self._model.tokenizer, text[len(shared) :]) for text in texts],
            context=self._encode(shared) if shared else None,
        )
        laid_out = lay_out(self._model, encoded, self._spec, self._sampling, self._group_size)
        self._open = stream(self._model, laid_out, self._prefix, (self._turn,))
        return self._open

    def reset(self, messages: Sequence[Mapping[str, str]] = ()) -> None:
        """Go on from these messages instead; what they share with the old ones is not read again."""
        self._end_open_turn()
        self.messages = _messages(messages)

    def _end_open_turn(self) -> None:
        """There is one cache: whoever left a turn open has ended it."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def _turn(self) -> int:
        """How many answers there were: every turn has random numbers of its own."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def _encode(self, text: str) -> list[int]:
        for known, ids in self._known:
            if text.startswith(known):
                return ids + encode(self._model.tokenizer, text[len(known) :])
        return encode(self._model.tokenizer, text)

    def _remember(self, asked: Message, text: str, ids: list[int], heard: Sequence[Event]) -> None:
        """Add a turn to the messages, and what is known of its tokens."""
        tokens = [event.token for event in heard if event.token is not None]
        content = "".join(event.text for event in heard)
        # What the last event gave is not in the cache; an end token gave nothing.
        self._prefix.ids = ids + [event.token for event in heard[:-1] if event.token is not None]
        self.messages += [asked, {"role": "assistant", "content": content}]
        # An answer that was cut, at a stop or within a character, has tokens that are not in its text.
        if self._model.tokenizer.decode(tokens, skip_special_tokens=True) == content:
            closed = template_text(self._model.tokenizer, self.messages, ask=False)
            # Templates may trim an answer; its tokens stay what they were.
            for said in (content, content.strip()):
                ending = closed.removeprefix(text + said)
                if ending and ending != closed:
                    ids = [*ids, *tokens, *encode(self._model.tokenizer, ending)]
                    self._known.insert(0, (closed, ids))
                    break


def _messages(messages: Any) -> list[Message]:
    """Raises:
    InputError: something that is not a list of turns with texts.
    """
    turns = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else [messages]
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise InputError(f"{turn!r} is not a turn; each has a role and a content, both texts")
    return [dict(turn) for turn in turns]
