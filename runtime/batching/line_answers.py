"""What turns a window of raw lines into records, in whatever process it is called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.runtime.batching.answers import records_in_order
from pos2d.runtime.batching.lines import parse_line
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.options import RequestOptions
from pos2d.text_files import json_line

# Numbers of lines, counted from 1, with their bytes.
Window = Sequence[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Records of consecutive lines as the bytes of the output, with their number and that of their new tokens."""

    data: bytes
    lines: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineOptions:
    """How lines are answered; ``plain`` and ``context`` are those of :func:`parse_line`."""

    options: RequestOptions
    plain: bool
    context: str | None

    def elsewhere(self) -> "LineOptions":
        """The same for a process with another working directory."""
        place = self.options.cache_context
        if place is None:
            return self
        return replace(self, options=replace(self.options, cache_context=str(Path(place).absolute())))

    def answers(self, artifact: LoadedArtifact, window: Window, done: int) -> Iterator[Answers]:
        """Answer one window; yield what follows the first ``done`` records of the file, in the order of lines."""
        parsed = [parse_line(number, raw, artifact, self.options, self.plain, self.context) for number, raw in window]
        for records in records_in_order(artifact, parsed, done, self.options.layout.branches_per_sequence):
            data = "".join(json_line(record) + "\n" for record in records).encode()
            yield Answers(data, len(records), sum(map(_token_count, records)))


def _token_count(record: dict[str, Any]) -> int:
    return sum(completion["new_tokens"] for completion in record.get("completions", ()))
