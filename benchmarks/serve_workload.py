"""The requests of the serving benchmarks: prompts of exact lengths in tokens, no two with the same beginning."""

import itertools
import random
import re
from pathlib import Path
from typing import Any

from http_load import Request
from tokenizers import Tokenizer

WORDS = re.findall(
    r"\w+",
    """
    the river house morning people water garden small light under road city green winter music open paper stone long
    summer bread table market bridge window story bird mountain train letter friend quiet
    """,
)
QUESTIONS = tuple(
    f"\n\nQuestion: What does the text say about the {word}?\nAnswer: The text says that"
    for word in ("river", "garden", "city", "winter", "music", "market", "bridge", "mountain")
)


class Workload:
    """Makes requests for ``/v1/completions``: greedy, streamed, with the usage at the end."""

    def __init__(self, tokenizer: Path, prompt_tokens: int, new_tokens: int, seed: int = 0) -> None:
        self.new_tokens = new_tokens
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._prompt_tokens = prompt_tokens
        self._draw = random.Random(seed)
        self._numbers = itertools.count(1)

    def text(self, tokens: int) -> str:
        """A text of so many tokens; its first words differ from those of every other."""
        begin = f"{next(self._numbers)} notes. "
        words = " ".join(self._draw.choice(WORDS) for _ in range(tokens))
        ids: list[int] = self._tokenizer.encode(begin + words, add_special_tokens=False).ids[:tokens]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def request(self, prompt: str, new_tokens: int | None = None, **extra: Any) -> Request:
        body = {
            "prompt": prompt,
            "max_tokens": new_tokens or self.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Request("/v1/completions", body | extra)

    def next(self) -> Request:
        """The next request of the usual size."""
        return self.request(self.text(self._prompt_tokens))

    def several(self, count: int) -> list[Request]:
        return [self.next() for _ in range(count)]

    def branches(self, context_tokens: int) -> Request:
        """One request: eight questions over one new context."""
        return self.request(self.text(context_tokens), branches=list(QUESTIONS), visibility="isolated")

    def questions(self, context_tokens: int) -> list[Request]:
        """The same as eight requests, for a server without branches."""
        context = self.text(context_tokens)
        return [self.request(context + question) for question in QUESTIONS]
