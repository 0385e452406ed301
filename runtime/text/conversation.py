"""A conversation with one KV cache for all turns, and questions that branch off it."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import Layout, build_layout
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.engine.sampler import new_token_limit
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.chat_template import render_messages, require_chat_template, split_prefix
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.end_tokens import end_token_ids
from pos2d.runtime.text.options import RequestOptions
from pos2d.runtime.text.requests import lay_out, stream_events
from pos2d.runtime.text.text_decode import decode_text
from pos2d.runtime.text.tokenization import EncodedPrompts, encode

Message = dict[str, str]


class Conversation:
    """``messages`` are the turns so far. An answer is added together with its question, also if it was interrupted.

    Only new tokens are prefilled in a turn. The tokens of an answer stay as they were generated, even if the tokenizer
    would encode its text differently.

    Raises:
        InputError: no tokenizer, no chat template, or messages of another form.
        UsageError: options that a conversation or this artifact cannot use.
    """

    def __init__(
        self, artifact: LoadedArtifact, messages: Sequence[Mapping[str, str]], options: RequestOptions
    ) -> None:
        if options.ignore_chat_template:
            raise UsageError("a conversation needs the chat template; leave `ignore_chat_template` out")
        require_chat_template(artifact.tokenizer)
        spec = artifact.manifest.rope_2d
        options.layout.check_effect(spec)
        end_token_ids(artifact.tokenizer, options.sampling)
        self._artifact = artifact
        self._spec = options.layout.apply_to(spec)
        self._branches_per_sequence = options.layout.branches_per_sequence
        self._sampling = options.sampling
        self._prefix = PrefixCache(artifact.backend, self._spec, artifact.manifest.context_length)
        # The rendered conversation up to the end of each assistant message, and its tokens; the latest comes first.
        self._encoded_turns: list[tuple[str, list[int]]] = []
        self._open: Generator[Event] | None = None
        self.messages: list[Message] = _checked_messages(messages)

    @property
    def prefilled_tokens(self) -> int:
        """Number of tokens that were prefilled in all turns together."""
        return self._prefix.prefilled_tokens

    def ask(self, question: str | Mapping[str, str]) -> Generator[Event]:
        """Stream the answer to the user's next message.

        Raises:
            InputError: an empty question, messages that the chat template does not accept, or no room in the context.
        """
        self._close_open_turn()
        (message,) = _checked_messages(
            [{"role": "user", "content": question} if isinstance(question, str) else question]
        )
        if message["role"] != "user":
            raise InputError(f"the next turn is the user's, not one of {message['role']!r}")
        if not message["content"].strip():
            raise InputError("the question is empty; give it some text")
        text = render_messages(self._artifact.tokenizer, [*self.messages, message], add_generation_prompt=True)
        ids = self._encode(text)
        limit = self._artifact.manifest.context_length
        if len(ids) > limit:
            raise InputError(f"the conversation takes {len(ids)} positions, the model has {limit}; begin a new one")
        new_token_limit(self._sampling, len(ids))
        self._artifact.check_ids(np.array(ids))
        self._open = self._answer(message, text, ids, build_layout([ids], self._spec))
        return self._open

    def _answer(self, question: Message, text: str, ids: list[int], layout: Layout) -> Generator[Event]:
        """Stream the answer to ``question``, which makes the conversation ``text``, and record the turn at the end."""
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
                self._record_turn(question, text, ids, events)

    def ask_branches(self, questions: str | Sequence[str]) -> Generator[Event]:
        """Stream the answers to several questions, each as the next turn; the conversation itself does not change.

        Raises:
            InputError: as :meth:`ask`.
        """
        self._close_open_turn()
        contents = [questions] if isinstance(questions, str) else questions
        if not all(content.strip() for content in contents):
            raise InputError("a question is empty; give it some text")
        tokenizer = self._artifact.tokenizer
        texts = [
            render_messages(
                tokenizer, [*self.messages, {"role": "user", "content": content}], add_generation_prompt=True
            )
            for content in contents
        ]
        prefix = render_messages(tokenizer, self.messages, add_generation_prompt=False) if self.messages else ""
        prompts = split_prefix(texts, prefix)
        if not prompts:
            raise InputError("this chat template cannot branch off a conversation; ask one question after the other")
        encoded = EncodedPrompts(
            branches=[encode(tokenizer, prompt) for prompt in prompts],
            context=self._encode(prefix) if prefix else None,
        )
        request = lay_out(self._artifact, encoded, self._spec, self._sampling, self._branches_per_sequence)
        self._open = stream_events(self._artifact, request, self._prefix, (self._turn,))
        return self._open

    def reset(self, messages: Sequence[Mapping[str, str]] = ()) -> None:
        """Continue from these messages instead; tokens that they share with the old ones stay in the cache."""
        self._close_open_turn()
        self.messages = _checked_messages(messages)

    def _close_open_turn(self) -> None:
        """Close a stream that its reader has left: with one cache, only one answer can be generated at a time."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def _turn(self) -> int:
        """Number of answers so far; it gives every turn its own random numbers."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def _encode(self, text: str) -> list[int]:
        """Token ids of the rendered conversation, with the tokens of earlier answers as they were generated."""
        for turns, ids in self._encoded_turns:
            if text.startswith(turns):
                return ids + encode(self._artifact.tokenizer, text[len(turns) :])
        return encode(self._artifact.tokenizer, text)

    def _record_turn(self, question: Message, text: str, ids: list[int], events: Sequence[Event]) -> None:
        """Add a question and its answer to the messages, and their tokens to the encoded turns if they are certain.

        ``text`` and its ``ids`` are the rendered conversation before the answer.
        """
        tokenizer = self._artifact.tokenizer
        tokens = [event.token for event in events if event.token is not None]
        answer = "".join(event.text for event in events)
        # The token of the last event was not fed, so it is not in the cache; an end token is no token of the answer.
        self._prefix.ids = ids + [event.token for event in events[:-1] if event.token is not None]
        self.messages += [question, {"role": "assistant", "content": answer}]
        # An answer that was cut, at a stop string or within a character, has tokens that are not in its text.
        if tokenizer.decode(tokens, skip_special_tokens=True) == answer:
            turns = render_messages(tokenizer, self.messages, add_generation_prompt=False)
            # A template may strip an answer; its tokens stay as they were generated.
            for rendered in (answer, answer.strip()):
                ending = turns.removeprefix(text + rendered)
                if ending and ending != turns:
                    ids = [*ids, *tokens, *encode(tokenizer, ending)]
                    self._encoded_turns.insert(0, (turns, ids))
                    break


def _checked_messages(messages: Any) -> list[Message]:
    """A copy of messages.

    Raises:
        InputError: not a list of messages, each with two texts.
    """
    turns = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else [messages]
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise InputError(f"{turn!r} is not a turn; each has a role and a content, both texts")
    return [dict(turn) for turn in turns]
