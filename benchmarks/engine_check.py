"""One engine beside ours: greedy tokens, the ids of texts and of the chat template, and the ends of answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine_agreement import Parting, follow, part
from engine_inputs import QUESTION, TEXTS, TURNS

WARM_UP = 4
# What an answer may take until it stops.
ANSWER = 256


class Asked(Protocol):
    """A worker; see engine_worker.py."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its reply."""


@dataclass(frozen=True, slots=True)
class Found:
    """One engine's agreement with ours.

    ``equal`` of ``tokens`` are the same, counted on after ties. So many ``texts`` and ``turns`` have the same ids, and
    so many turns, ``stops``, are answered up to a stop token of the engine's own.
    """

    tokens: int
    equal: int
    partings: tuple[Parting, ...]
    texts: int
    turns: int
    stops: int
    tokens_per_second: float

    @property
    def faults(self) -> list[str]:
        """What differs without a tie; empty where the engine says what ours says."""
        found = [f"{parting.where} parts at token {parting.position}" for parting in self.partings if not parting.tied]
        counts = ((TEXTS, self.texts, "texts have other ids"), (TURNS, self.turns, "turns have other ids"))
        found += [f"{len(all_) - same} {what}" for all_, same, what in counts if same < len(all_)]
        return found + [f"{len(TURNS) - self.stops} answers do not stop"] * (self.stops < len(TURNS))


class Reference:
    """Our model in float32, which stays open: what it says, and the logits of tokens that others say."""

    def __init__(self, worker: Asked, new: int) -> None:
        self._worker = worker
        self.texts = {name: worker.ask({"text": text})["ids"] for name, text in TEXTS.items()}
        self.turns = [worker.ask({"messages": turn, "new": ANSWER}) for turn in TURNS]
        asked = worker.ask({"messages": QUESTION, "new": WARM_UP})["ids"]
        self.prompts: dict[str, list[int]] = {**self.texts, "chat": asked}
        replies = {name: worker.ask({"ids": ids, "new": new}) for name, ids in self.prompts.items()}
        self.answers: dict[str, list[int]] = {name: reply["tokens"] for name, reply in replies.items()}
        self._seconds = sum(reply["seconds"] for reply in replies.values())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers.values()))

    def itself(self) -> Found:
        """Its own row, where only the stops can be at fault."""
        stops = sum(turn["stopped"] for turn in self.turns)
        return Found(self.tokens, self.tokens, (), len(TEXTS), len(TURNS), stops, self.tokens / self._seconds)

    def logits_after(self, ids: Sequence[int]) -> Callable[[Sequence[int], list[int]], list[float]]:
        """The logits of tokens after a prompt's ``ids`` and the beginning of an answer."""

        def logits(said: Sequence[int], tokens: list[int]) -> list[float]:
            found: list[float] = self._worker.ask({"ids": [*ids, *said], "of": tokens})["logits"]
            return found

        return logits


def check(worker: Asked, reference: Reference, bits: int) -> Found:
    """Ask an engine that computes with so many bits everything, and compare it with ours."""
    texts = [worker.ask({"text": text})["ids"] == reference.texts[name] for name, text in TEXTS.items()]
    turns = [worker.ask({"messages": turn, "new": ANSWER}) for turn in TURNS]
    partings: list[Parting | None] = []
    for number, (ours, theirs) in enumerate(zip(reference.turns, turns, strict=True), 1):
        logits = reference.logits_after(ours["ids"])
        partings.append(part(f"turn {number}", ours["tokens"], theirs["tokens"], logits, bits))
    worker.ask({"ids": reference.prompts["chat"], "new": WARM_UP})
    equal, seconds = 0, 0.0
    for name in reference.prompts:
        same, found, took = _follow(worker, reference, name, bits)
        equal, seconds = equal + same, seconds + took
        partings += found
    return Found(
        tokens=reference.tokens,
        equal=equal,
        partings=tuple(parting for parting in partings if parting is not None),
        texts=sum(texts),
        turns=sum(ours["ids"] == theirs["ids"] for ours, theirs in zip(reference.turns, turns, strict=True)),
        stops=sum(turn["stopped"] for turn in turns),
        tokens_per_second=reference.tokens / seconds,
    )


def _follow(worker: Asked, reference: Reference, name: str, bits: int) -> tuple[int, list[Parting], float]:
    """Equal tokens and partings of the answer to one prompt, and the seconds that the whole answer took."""
    ids, answer = reference.prompts[name], reference.answers[name]
    seconds: list[float] = []

    def ask(said: Sequence[int]) -> list[int]:
        reply = worker.ask({"ids": [*ids, *said], "new": len(answer) - len(said)})
        seconds.append(reply["seconds"])
        tokens: list[int] = reply["tokens"]
        return tokens

    same, partings = follow(name, answer, ask, reference.logits_after(ids), bits)
    return same, partings, seconds[0]
