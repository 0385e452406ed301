"""Answer every line of a file, many at a time; killed and started again, go on where it was."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Unpack

from pos2d import __version__
from pos2d.errors import InputError, UsageError
from pos2d.manifest import FILE_NAME
from pos2d.progress import Progress
from pos2d.runtime.backends.options import LoadFlags, LoadOptions
from pos2d.runtime.batching.lines import Line, read_line, side_by_side
from pos2d.runtime.batching.output import BatchOutput
from pos2d.runtime.engine.sampling import Sampling, SamplingFlags, resolve_sampling
from pos2d.runtime.flags import check_known, part_of
from pos2d.runtime.load import load
from pos2d.runtime.model.model import Model
from pos2d.runtime.run import RunFlags
from pos2d.runtime.text.completions import Completion, answer, collect
from pos2d.runtime.text.requests import GenerationFlags, check_heeded, group_size, stream

# Lines that are looked at together. What stands side by side depends on nothing else: a run that was interrupted
# computes the rest exactly as it would have.
WINDOW = 64
# Prompt tokens of lines that share a sequence: beyond that, what they cost each other is more than they save.
SHARED_TOKENS = 2048
# In files of other names a line may be a prompt as it stands; in these it is a mistake.
JSON_SUFFIXES = (".jsonl", ".json")
OTHER_LINE_ENDS = "\x85\u2028\u2029"
# Files of an artifact, beside its manifest, that say what a prompt becomes.
READING = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class BatchReport:
    """``lines`` of the output, ``errors`` of them without an answer; ``resumed`` were there from an earlier run.

    ``new_tokens``, ``seconds`` and ``tokens_per_second`` are those of this run, loading left out.
    """

    output: str
    lines: int
    errors: int
    resumed: int
    new_tokens: int
    seconds: float
    tokens_per_second: float

    @property
    def warnings(self) -> list[str]:
        return [f"{self.errors} of {self.lines} lines have an error in place of an answer"] if self.errors else []

    def summary(self) -> str:
        before = f", {self.resumed} of them from before" if self.resumed else ""
        rate = f"{self.new_tokens} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.1f} tokens/s"
        return f"{self.output}: {self.lines} lines{before}; {rate}"


def batch(
    artifact: str | Path, input: str | Path, output: str | Path, *, force: bool = False, **flags: Unpack[RunFlags]
) -> BatchReport:
    """Write ``output`` with a record for every line of ``input``, in the same order.

    Lines with one prompt are answered side by side in one sequence, in which they do not see each other; the branches
    of one line see each other as the artifact was trained. A line that cannot be answered has an ``error``.

    The output appears when it is whole. The same call goes on with what an interrupted one has written, to the same
    bytes, and does nothing where it was finished; ``force`` replaces another output. The other arguments are those of
    :meth:`pos2d.runtime.Model.stream` and of :func:`pos2d.load`; the options of a line win over them.

    Raises:
        InputError: not an artifact, an input that cannot be read, an artifact without a tokenizer.
        UsageError: a value that cannot be used.
        OutputError: an output of another run, or one that another process writes.
    """
    source = Path(input)
    check_known(RunFlags, flags)
    sampling = resolve_sampling(Path(artifact), part_of(SamplingFlags, flags))
    lines = _count_lines(source)
    result = BatchOutput(Path(output), _recipe(Path(artifact), source, sampling, flags))
    if any(path.exists() and path.samefile(source) for path in result.files):
        raise UsageError(f"{output} would be written over {input}; name another output")
    if result.is_finished(force):
        return _report(result.path, lines, _Work(resumed=lines), 0.0)
    model = load(artifact, **part_of(LoadFlags, flags))
    generation = part_of(GenerationFlags, flags)
    group_size(generation)
    check_heeded(model.manifest.rope_2d, generation)
    _ = model.tokenizer
    plain = source.suffix not in JSON_SUFFIXES
    started = time.monotonic()
    work = _Work()
    with result.opened(force) as (file, done), Progress("answering", lines) as progress:
        work.resumed = done
        progress.advance(done)
        for window in _windows(source, done):
            read = [read_line(number, raw, model, sampling, generation, plain) for number, raw in window]
            for records in _in_order(model, read, done, generation, work):
                _write(file, records)
                rate = work.new_tokens / (time.monotonic() - started)
                progress.advance(len(records), f"{rate:.0f} tokens/s")
    return _report(result.path, lines, work, time.monotonic() - started)


@dataclass(slots=True)
class _Work:
    """What was done so far."""

    new_tokens: int = 0
    resumed: int = 0


def _in_order(
    model: Model, lines: Sequence[Line], done: int, flags: GenerationFlags, work: _Work
) -> Iterator[list[dict[str, Any]]]:
    """Records of one window that follow the ``done`` first of the file, as soon as none before them is missing."""
    ready: dict[int, dict[str, Any]] = {}
    following = max(done + 1, lines[0].number)
    for unit in _units(lines, group_size(flags)):
        if unit[-1].number <= done:
            continue
        for line, completions in zip(unit, _answers(model, unit), strict=True):
            ready[line.number] = _record(line, completions)
            if line.number > done:
                work.new_tokens += sum(len(completion.token_ids) for completion in completions)
        records = []
        while following in ready:
            records.append(ready.pop(following))
            following += 1
        if records:
            yield records


def _units(lines: Sequence[Line], size: int) -> list[list[Line]]:
    """Lines that are decoded together, in the order of their last ones: ordinary ones share, others stand alone."""
    units: list[list[Line]] = []
    shared: list[Line] = []
    for line in lines:
        if not line.is_ordinary:
            units.append([line])
            continue
        if shared and (len(shared) == size or _tokens([*shared, line]) > SHARED_TOKENS):
            units.append(shared)
            shared = []
        shared.append(line)
    if shared:
        units.append(shared)
    return sorted(units, key=lambda unit: unit[-1].number)


def _tokens(lines: Sequence[Line]) -> int:
    return sum(line.asked.prompt_tokens for line in lines if line.asked is not None)


def _answers(model: Model, unit: Sequence[Line]) -> list[list[Completion]]:
    """The answers of every line."""
    if unit[0].asked is None:
        return [[]]
    if not unit[0].is_ordinary:
        return [collect(stream(model, unit[0].asked), [""] * len(unit[0].asked.encoded.branches))]
    layout = side_by_side(unit, model)
    samplings = [line.asked.sampling for line in unit if line.asked is not None]
    # Every line has the random numbers that it would have by itself.
    events = answer(model, layout, samplings, [(0,)] * len(unit))
    return [[completion] for completion in collect(events, [""] * len(unit))]


def _record(line: Line, completions: Sequence[Completion]) -> dict[str, Any]:
    head = {"line": line.number, **line.echoed}
    if line.error is not None:
        return head | {"error": line.error}
    return head | {"completions": [_completion(completion) for completion in completions]}


def _completion(completion: Completion) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "new_tokens": len(completion.token_ids),
    }
    return facts if completion.logprobs is None else facts | {"logprobs": list(completion.logprobs)}


def _write(file: IO[bytes], records: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for end in OTHER_LINE_ENDS:  # what some programs take for the end of a line
        lines = lines.replace(end, f"\\u{ord(end):04x}")
    file.write(lines.encode())
    file.flush()
    os.fsync(file.fileno())


def _windows(path: Path, done: int) -> Iterator[list[tuple[int, bytes]]]:
    """Windows of numbered lines, from the one on that has the first line after ``done``."""
    with path.open("rb") as file:
        numbered = enumerate(file, 1)
        skipped = done - done % WINDOW
        for _ in islice(numbered, skipped):
            pass
        while window := list(islice(numbered, WINDOW)):
            if window[-1][0] > done:
                yield window


def _count_lines(path: Path) -> int:
    """Raises:
    InputError: it cannot be read, or is empty.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file, which can be read twice; write the lines to one")
    try:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if count == 0:
        raise InputError(f"{path} is empty; it must have a line for every question")
    return count


def _recipe(artifact: Path, source: Path, sampling: Sampling, flags: RunFlags) -> dict[str, Any]:
    """Everything that the output depends on; equal ones make equal bytes on the same machine."""
    said = {name: value for name, value in flags.items() if value is not None and value is not False}
    layout = {name: value for name, value in said.items() if name not in SamplingFlags.__annotations__}
    read = (artifact / name for name in (FILE_NAME, *READING))
    recipe = {
        "input": {"name": source.name, "sha256": _sha256(source)},
        "artifact": {"name": artifact.name, "sha256": {path.name: _sha256(path) for path in read if path.is_file()}},
        "sampling": asdict(sampling),
        "options": {**asdict(LoadOptions(**part_of(LoadFlags, flags))), **layout},
        "tool_version": __version__,
    }
    described: dict[str, Any] = json.loads(json.dumps(recipe))  # as it comes back from a file
    return described


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report(output: Path, lines: int, work: _Work, seconds: float) -> BatchReport:
    with output.open("rb") as file:
        errors = sum("error" in json.loads(line) for line in file)
    return BatchReport(
        output=str(output),
        lines=lines,
        errors=errors,
        resumed=work.resumed,
        new_tokens=work.new_tokens,
        seconds=seconds,
        tokens_per_second=work.new_tokens / seconds if seconds else 0.0,
    )
