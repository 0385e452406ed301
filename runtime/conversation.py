"""A conversation whose cache stays from turn to turn, and questions that branch off it."""

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.layout import build_layout
from runtime.answers import Event, answer
from runtime.flags import part_of
from runtime.generation import GenerationFlags, check_heeded, chosen_spec, group_size, lay_out, stream
from runtime.prefix import Prefix
from runtime.sampling import SamplingFlags, resolve_sampling
from runtime.text import EncodedPrompts, encode, require_chat_template, template_text

if TYPE_CHECKING:
    from runtime.model import Model

Message = dict[str, str]


class Conversation:
    """``messages`` are the turns so far; an answer is added with its question, also when it was interrupted.

    A turn reads only what is new: the tokens of an answer stay as they were written, whatever the tokenizer would make
    of its text.
    """

    def __init__(self, model: "Model", messages: Sequence[Mapping[str, str]], options: GenerationFlags) -> None:
        require_chat_template(model.tokenizer)
        self._model = model
        check_heeded(model.manifest.rope_2d, options)
        self._spec = chosen_spec(model.manifest.rope_2d, options)
        self._group_size = group_size(options)
        self._sampling = resolve_sampling(model.path, part_of(SamplingFlags, options))
        self._prefix = Prefix(model.backend, self._spec, model.manifest.context_length)
        # Texts of the conversation up to the end of each answer, the last one first, and the tokens of that.
        self._known: list[tuple[str, list[int]]] = []
        self.messages: list[Message] = [_message(message) for message in messages]

    @property
    def tokens_read(self) -> int:
        """Tokens that were encoded as prompts in all turns together."""
        return self._prefix.tokens_read

    def ask(self, question: str | Mapping[str, str]) -> Generator[Event]:
        """The answer to the user's next turn, token by token.

        Raises:
            InputError: an empty question, messages that the chat template does not take, or no room in the context.
        """
        asked = _message(question)
        text = template_text(self._model.tokenizer, [*self.messages, asked], ask=True)
        ids = self._encode(text)
        limit = self._model.manifest.context_length
        if len(ids) > limit:
            raise InputError(f"the conversation takes {len(ids)} positions, the model has {limit}; begin a new one")
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

        return answered()

    def ask_branches(self, questions: Sequence[str]) -> Generator[Event]:
        """Answers to several questions side by side, each as the next turn; the conversation stays as it is.

        Raises:
            InputError: as :meth:`ask`.
        """
        asked = [[*self.messages, _message(question)] for question in questions]
        texts = [template_text(self._model.tokenizer, messages, ask=True) for messages in asked]
        shared = template_text(self._model.tokenizer, self.messages, ask=False) if self.messages else ""
        if not texts or not all(text.startswith(shared) and len(text) > len(shared) for text in texts):
            raise InputError("this chat template does not let several questions follow a conversation; ask one by one")
        encoded = EncodedPrompts(
            branches=[encode(self._model.tokenizer, text[len(shared) :]) for text in texts],
            context=self._encode(shared) if shared else None,
        )
        laid_out = lay_out(self._model, encoded, self._spec, self._sampling, self._group_size)
        return stream(self._model, laid_out, self._prefix, (self._turn,))

    def reset(self, messages: Sequence[Mapping[str, str]] = ()) -> None:
        """Go on from these messages instead; what they share with the old ones is not read again."""
        self.messages = [_message(message) for message in messages]

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
        at_stop_text = heard[-1].finish_reason == "stop" and heard[-1].token is not None
        if not at_stop_text:  # of which tokens are there, but no text
            # Templates may trim an answer; its tokens stay what they were.
            self._known = [(text + said, ids + tokens) for said in (content, content.strip())] + self._known


def _message(message: str | Mapping[str, str]) -> Message:
    """Raises:
    InputError: not a turn, or one without text.
    """
    turn = {"role": "user", "content": message} if isinstance(message, str) else dict(message)
    if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        raise InputError(f"{turn!r} is not a turn; each has a role and a content, both texts")
    if not turn["content"].strip() and turn["role"] == "user":
        raise InputError("the question is empty; give it some text")
    return turn
