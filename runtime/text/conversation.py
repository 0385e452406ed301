"""A conversation with one KV cache for all turns, and questions that branch off it."""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import Layout, build_layout
from pos2d.messages import text_messages
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.engine.sampler import new_token_limit
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.chat_template import (
    check_arguments,
    render_for_answer,
    render_questions,
    require_chat_template,
)
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.context_store import ContextStore
from pos2d.runtime.text.options import RequestOptions
from pos2d.runtime.text.requests import lay_out, stream_events
from pos2d.runtime.text.sampling_checks import check_sampling
from pos2d.runtime.text.text_decode import decode_text
from pos2d.runtime.text.tokenization import EncodedText, encode_longer, encode_text, share_context

Message = dict[str, Any]
NEXT_ROLES = ("user", "tool", "assistant")


class Conversation:
    """``messages`` are the turns so far. An answer is added together with its question, also if it was interrupted.

    Only new tokens are prefilled in a turn. The tokens of an answer stay as they were generated, even if the tokenizer
    would encode its text differently, as long as the conversation's text is the same.

    Raises:
        InputError: no tokenizer, no chat template, or messages of another form.
        UsageError: options that a conversation or this artifact cannot use.
    """

    def __init__(
        self, artifact: LoadedArtifact, messages: Sequence[Mapping[str, Any]], options: RequestOptions
    ) -> None:
        if options.ignore_chat_template:
            raise UsageError("a conversation needs the chat template; leave `ignore_chat_template` out")
        require_chat_template(artifact.tokenizer)
        check_arguments(artifact.tokenizer, options.chat_template_kwargs, uses_template=True)
        spec = artifact.manifest.rope_2d
        options.layout.check_effect(spec)
        check_sampling(artifact, options.sampling)
        self._artifact = artifact
        self._spec = options.layout.apply_to(spec)
        self._branches_per_sequence = options.layout.branches_per_sequence
        self._sampling = options.sampling
        self._arguments = options.chat_template_kwargs
        self._prefix = PrefixCache(artifact.backend, self._spec, artifact.manifest.context_length)
        # The rendered conversation up to the end of each assistant message, and its tokens with the answers as
        # generated; the latest comes first.
        self._encoded_turns: list[tuple[EncodedText, list[int]]] = []
        self._open: Generator[Event] | None = None
        self.messages: list[Message] = text_messages(messages)
        options.check_cache(*(message["content"] for message in self.messages[:1]))
        if options.cache_context is not None:
            self._fill_from_store(Path(options.cache_context))

    def _fill_from_store(self, place: Path) -> None:
        """Read the keys and values of the messages so far from their file, or compute and write them.

        Raises:
            InputError, UsageError, StorageError: as :meth:`pos2d.runtime.text.context_store.ContextStore.fill`.
        """
        _, text = render_questions(self._artifact.tokenizer, self.messages, [], self._arguments)
        ids = self._encode(text)
        self._artifact.check_ids(np.array(ids))
        ContextStore(self._artifact, place).fill(self._prefix, ids[: self._artifact.manifest.context_length])

    @property
    def prefilled_tokens(self) -> int:
        """Number of tokens that were prefilled in all turns together."""
        return self._prefix.prefilled_tokens

    def ask(self, question: str | Mapping[str, Any]) -> Generator[Event]:
        """Stream the answer to the user's next message.

        A message of the assistant is an answer that has begun: it is continued, and the events are what follows it.

        Raises:
            InputError: an empty question, messages that the chat template does not accept, or no room in the context.
        """
        self._close_open_turn()
        (message,) = text_messages([{"role": "user", "content": question} if isinstance(question, str) else question])
        if message["role"] not in NEXT_ROLES:
            raise InputError(f"the next turn is the user's, not one of {message['role']!r}")
        if message["role"] == "user" and not message["content"].strip():
            raise InputError("the question is empty; give it some text")
        text = render_for_answer(self._artifact.tokenizer, [*self.messages, message], self._arguments)
        ids = self._encode(text)
        limit = self._artifact.manifest.context_length
        if len(ids) > limit:
            raise InputError(f"the conversation takes {len(ids)} positions, the model has {limit}; begin a new one")
        new_token_limit(self._sampling, len(ids))
        self._artifact.check_ids(np.array(ids))
        self._open = self._answer(message, text, ids, build_layout([ids], self._spec))
        return self._open

    def _answer(self, message: Message, text: str, ids: list[int], layout: Layout) -> Generator[Event]:
        """Stream the answer to ``message``, which makes the conversation ``text``, and record the turn at the end."""
        start = self._prefix.keep_common(ids[:-1])  # the last token is always fed, for its logits
        events: list[Event] = []
        try:
            columns = decode_text(self._artifact, layout, [self._sampling], [(self._turn,)], self._prefix.cache, start)
            for (event,) in columns:
                if not events:
                    self._prefix.record(ids, start)
                events.append(event)
                yield event
        finally:
            if events:
                self._record_turn(message, text, ids, events)

    def ask_branches(self, questions: str | Sequence[str]) -> Generator[Event]:
        """Stream the answers to several questions, each as the next turn; the conversation itself does not change.

        Raises:
            InputError: as :meth:`ask`.
        """
        self._close_open_turn()
        contents = [questions] if isinstance(questions, str) else questions
        if not contents or not all(content.strip() for content in contents):
            raise InputError("a question is empty; give it some text")
        texts, shared = render_questions(self._artifact.tokenizer, self.messages, contents, self._arguments)
        known = encode_text(self._artifact.tokenizer, shared, self._latest(shared))
        encoded = share_context((self._encode(text, known) for text in texts), self._encode(shared, known))
        request = lay_out(self._artifact, encoded, self._spec, self._sampling, self._branches_per_sequence)
        self._open = stream_events(self._artifact, request, self._prefix, (self._turn,))
        return self._open

    def reset(self, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        """Continue from these messages instead; tokens that they share with the old ones stay in the cache."""
        self._close_open_turn()
        self.messages = text_messages(messages)

    def _close_open_turn(self) -> None:
        """Close a stream that its reader has left: with one cache, only one answer can be generated at a time."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def _turn(self) -> int:
        """Number of answers so far; it gives every turn its own random numbers."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def _latest(self, text: str) -> EncodedText | None:
        """The longest encoded turns that ``text`` begins with."""
        return next((turns for turns, _ in self._encoded_turns if text.startswith(turns.text)), None)

    def _encode(self, text: str, known: EncodedText | None = None) -> list[int]:
        """Token ids of the rendered conversation, with the tokens of earlier answers as they were generated.

        Everything else has the tokens of the whole text. If one of those reaches over the end of an earlier turn, then
        the answer in that turn has them, too. ``text`` may be ``known`` continued, which spares encoding that again.
        """
        known = known or self._latest(text) or EncodedText("", [])
        whole = encode_longer(self._artifact.tokenizer, text, known)
        for turns, ids in self._encoded_turns:
            if text.startswith(turns.text) and whole[: len(turns.ids)] == turns.ids:
                return ids + whole[len(turns.ids) :]
        return whole

    def _record_turn(self, message: Message, text: str, ids: list[int], events: Sequence[Event]) -> None:
        """Add a message and its answer to the messages, and their tokens to the encoded turns if they fit the text.

        ``text`` and its ``ids`` are the rendered conversation before the answer.
        """
        tokens = [event.token for event in events if event.token is not None]
        answer = "".join(event.text for event in events)
        # The token of the last event was not fed, so it is not in the cache; an end token is no token of the answer.
        self._prefix.ids = ids + [event.token for event in events[:-1] if event.token is not None]
        if message["role"] == "assistant":
            begun: str = message["content"]
            if not text.endswith(begun):  # the template trims it
                begun = begun.rstrip()
            self.messages.append({**message, "content": begun + answer})
        else:
            self.messages += [message, {"role": "assistant", "content": answer}]
        try:
            _, turns = render_questions(self._artifact.tokenizer, self.messages, [], self._arguments)
        except InputError:  # the template takes no further question
            return
        if turns.startswith(text + answer) and len(turns) > len(text + answer):
            self._record_tokens(turns, text + answer, [*ids, *tokens])

    def _record_tokens(self, turns: str, answered: str, ids: list[int]) -> None:
        """Keep ``ids`` of ``answered``, the beginning of ``turns``, if they say what the tokenizer's own tokens say.

        They do not if the answer was cut at a stop string or within a character, or has special tokens, which are not
        shown.
        """
        tokenizer = self._artifact.tokenizer
        known = encode_text(tokenizer, answered, self._latest(answered))
        whole = encode_text(tokenizer, turns, known)
        if whole.ids[: len(known.ids)] == known.ids:
            ids = ids + whole.ids[len(known.ids) :]
            spoken, read = (tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in (ids, whole.ids))
            if spoken == read:
                self._encoded_turns.insert(0, (whole, ids))
