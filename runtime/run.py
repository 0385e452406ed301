"""Answer prompts with an artifact: one as ordinary text, several as branches of one sequence."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from pos2d.spec import Visibility
from runtime.engine import Column, FinishReason
from runtime.load import load
from runtime.options import LoadFlags
from runtime.text import GrowingText, encode_prompts, load_tokenizer

TextListener = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, without its end token."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class RunReport:
    """Answers and times: ``first_seconds`` for the prompts and the first column, ``decode_seconds`` for the rest.

    ``tokens_per_second`` is the rate of that rest, over all branches; 0 where there was none.
    """

    visibility: Visibility
    completions: tuple[Completion, ...]
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    first_seconds: float
    decode_seconds: float
    tokens_per_second: float


def run(
    artifact: str | Path,
    prompt: Sequence[str],
    *,
    context: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    visibility: Visibility | None = None,
    ignore_chat_template: bool = False,
    on_text: TextListener | None = None,
    **loading: Unpack[LoadFlags],
) -> RunReport:
    """Answer every prompt; ``on_text(branch, new_text)`` hears the text as it is written.

    ``context`` is seen by all prompts. Prompts go through the artifact's chat template where it has one. The other
    arguments are those of :meth:`runtime.Model.stream_ids`, ``loading`` those of :func:`runtime.load`.

    Raises:
        InputError: not an artifact, no tokenizer, an empty prompt, prompts longer than the model.
        UsageError: a number, device or type that cannot be used.
    """
    started = time.monotonic()
    model = load(artifact, **loading)
    tokenizer = load_tokenizer(model.path)
    seen = visibility or model.manifest.rope_2d.visibility
    encoded = encode_prompts(
        tokenizer,
        prompt,
        context,
        chat=bool(tokenizer.chat_template) and not ignore_chat_template,
        ordinary=len(prompt) == 1 or seen == "isolated",
    )
    columns = model.stream_ids(
        encoded.branches, encoded.context, max_new_tokens, temperature, visibility=seen, seed=seed
    )
    loaded = time.monotonic()
    answers = _collect(columns, [GrowingText(tokenizer) for _ in prompt], on_text)
    return RunReport(
        visibility=seen,
        completions=_completions(prompt, answers),
        prompt_tokens=sum(map(len, encoded.branches)) + len(encoded.context or ()),
        new_tokens=answers.tokens,
        load_seconds=loaded - started,
        first_seconds=answers.first - loaded,
        decode_seconds=answers.ended - answers.first,
        tokens_per_second=answers.rate,
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """Texts and why each ended; ``first`` and ``ended`` are clock times of the first column and of the last."""

    texts: list[GrowingText]
    reasons: tuple[FinishReason, ...]
    first: float
    ended: float

    @property
    def tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)

    @property
    def rate(self) -> float:
        """Tokens a second after the first column."""
        later = self.tokens - sum(1 for text in self.texts if text.ids)
        return later / (self.ended - self.first) if later else 0.0


def _completions(prompts: Sequence[str], answers: _Answers) -> tuple[Completion, ...]:
    return tuple(
        Completion(prompt, text.text, tuple(text.ids), reason)
        for prompt, text, reason in zip(prompts, answers.texts, answers.reasons, strict=True)
    )


def _collect(columns: Iterable[Column], texts: list[GrowingText], on_text: TextListener | None) -> _Answers:
    first: float | None = None
    reasons: tuple[FinishReason | None, ...] = ()
    for column in columns:
        first = first or time.monotonic()
        reasons = column.finished
        for branch, token in enumerate(column.tokens):
            if token is not None:
                _tell(on_text, branch, texts[branch].append(token))
    ended = time.monotonic()
    for branch, text in enumerate(texts):
        _tell(on_text, branch, text.close())
    return _Answers(texts, tuple(reason or "length" for reason in reasons), first or ended, ended)


def _tell(listener: TextListener | None, branch: int, text: str) -> None:
    if listener is not None and text:
        listener(branch, text)
