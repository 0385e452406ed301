"""Answer every line of a file, many at a time; a run that was interrupted continues where it ended."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import UsageError
from pos2d.options import read_options, takes_options
from pos2d.progress import Progress
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.batching.input_file import JSON_SUFFIXES, STANDARD_INPUT, count_lines, input_file, windows
from pos2d.runtime.batching.line_answers import Answers, LineOptions
from pos2d.runtime.batching.lines import context_of_line
from pos2d.runtime.batching.output import BatchOutput, write_records
from pos2d.runtime.batching.recipe import recipe_of
from pos2d.runtime.cluster.options import ClusterOptions
from pos2d.runtime.engine.sampling import SamplingOptions
from pos2d.runtime.load import load_opened
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.runtime.text.options import ContextOptions, LayoutOptions, PromptOptions, RequestOptions, request_options

# The answers to all lines after those that are done, in their order.
AnswersAfter = Callable[[int], Generator[Answers]]


@dataclass(frozen=True, slots=True)
class BatchReport:
    """Counts of lines: all ``lines`` of the output, those with an error, and those ``resumed`` from an earlier run.

    ``empty`` counts lines all of whose answers are empty. ``common_error`` is the most frequent error, with the number
    of lines that have it and the first of them. ``new_tokens``, ``seconds`` and ``tokens_per_second`` are those of this
    run, without loading. ``settings_warnings`` name generation settings of the artifact that are not used.
    """

    output: str
    lines: int
    errors: int
    resumed: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    empty: int = 0
    common_error: str | None = None
    common_error_count: int = 0
    common_error_line: int | None = None
    settings_warnings: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        found = [*self.settings_warnings]
        if self.empty:
            found.append(
                f"{self.empty} of {self.lines} lines have empty answers; a last message that is the assistant's is "
                "continued, so leave it out to have the turn before it answered"
            )
        if self.errors:
            is_whole = self.common_error_count in (1, self.errors)
            share = "" if is_whole else f"{self.common_error_count} of them: "
            found.append(
                f"{self.errors} of {self.lines} lines have an error in place of an answer; {share}line "
                f"{self.common_error_line}: {self.common_error}"
            )
        return found

    @property
    def has_failed(self) -> bool:
        """Whether no line has an answer."""
        return self.errors == self.lines

    def summary(self) -> str:
        resumed = f", {self.resumed} of them from an earlier run" if self.resumed else ""
        rate = f"{self.new_tokens} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.1f} tokens/s"
        lines = "1 line" if self.lines == 1 else f"{self.lines} lines"
        return f"{self.output}: {lines}{resumed}; {rate}"


@takes_options(SamplingOptions, LayoutOptions, PromptOptions, ContextOptions, LoadOptions, ClusterOptions)
def batch(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    context: str | None = None,
    force: bool = False,
    **options: Any,
) -> BatchReport:
    """Write ``output`` with a record for every line of ``input``, in the same order.

    Every line is a sequence of its own, and many lines share each forward pass. The branches of one line see each
    other as the artifact was trained. A line that cannot be answered has an ``error``. ``context`` is the context, or
    the system message, of every line that has none. The ``input`` ``-`` is standard input.

    The output appears when it is whole. The same call continues an interrupted run, to the same bytes, and does
    nothing if the run was finished; ``force`` replaces the output of another run. The options are those of
    :meth:`pos2d.runtime.Model.stream` and of :func:`pos2d.load`; options in a line override them.

    Raises:
        InputError: no model, an input that cannot be read, a model without a tokenizer.
        UsageError: a value that cannot be used.
        OutputError: the output of another run, or one that another process writes.
    """
    loading, cluster = read_options(options, LoadOptions, ClusterOptions)
    opened = open_model(model)
    answering = request_options(opened.directory, options)
    warnings = tuple(answering.sampling.warnings(opened.place))
    with input_file(input) as source:
        lines = count_lines(source, "standard input" if str(input) == STANDARD_INPUT else str(input))
        recipe = recipe_of(opened, source, answering, loading, context)
        result = BatchOutput(Path(output), recipe)
        if any(path.exists() and path.samefile(source) for path in result.files):
            raise UsageError(f"{output} would be written over {input}; name another output")
        if result.is_finished(force):
            return _report(result.path, lines, lines, 0, 0.0, warnings)
        answering.layout.check_effect(opened.manifest.rope_2d)
        if answering.cache_context is not None:
            _check_cache(answering, source, context)
        line_options = LineOptions(options=answering, plain=source.suffix not in JSON_SUFFIXES, context=context)
        # A model without a tokenizer is refused before the output is opened.
        with _engine(cluster, model, opened, loading, line_options, source, lines) as answers:
            started = time.monotonic()
            resumed, new_tokens = _write_answers(result, lines, answers, force)
            return _report(result.path, lines, resumed, new_tokens, time.monotonic() - started, warnings)


@contextlib.contextmanager
def _engine(
    cluster: ClusterOptions,
    model: str | Path,
    opened: OpenedModel,
    loading: LoadOptions,
    lines: LineOptions,
    source: Path,
    count: int,
) -> Iterator[AnswersAfter]:
    """What answers the lines of ``source``, ``count`` of them: the model in this process, or workers of Ray."""
    if cluster.engine == "local":
        loaded = load_opened(opened, loading)
        _ = loaded.tokenizer
        yield lambda done: (
            answers for window in windows(source, done) for answers in lines.answers(loaded, window, done)
        )
        return
    from pos2d.runtime.cluster.engine import ray_engine

    with ray_engine(cluster, model, opened, loading, load_opened, lines, source, count) as answers:
        yield answers


def _write_answers(result: BatchOutput, lines: int, answers: AnswersAfter, force: bool) -> tuple[int, int]:
    """Write the missing records; return the number of records that were there, and of tokens that were generated."""
    new_tokens, started = 0, time.monotonic()
    with result.opened(force) as (file, done), Progress("answering", lines) as progress:
        progress.advance(done)
        with contextlib.closing(answers(done)) as following:
            for part in following:
                write_records(file, part.data)
                new_tokens += part.new_tokens
                progress.advance(part.lines, f"{new_tokens / (time.monotonic() - started):.0f} tokens/s")
    return done, new_tokens


def _check_cache(options: RequestOptions, source: Path, context: str | None) -> None:
    """Check ``cache_context`` against the contexts of all lines; ``context`` is that of lines without one.

    Raises:
        UsageError: no line has a context by itself, there are several for one file, or something else is in its place.
    """
    plain = source.suffix not in JSON_SUFFIXES
    lines = (line for window in windows(source, 0) for line in window)
    contexts = {context_of_line(number, raw, plain, context) for number, raw in lines}
    if contexts == {None} and context is not None:
        raise UsageError(
            "`cache_context` stores a context before prompts, and every line has messages or an error; leave it out"
        )
    options.check_cache(*contexts)


def _report(
    output: Path, lines: int, resumed: int, new_tokens: int, seconds: float, warnings: tuple[str, ...]
) -> BatchReport:
    errors: list[tuple[str, int]] = []
    empty = 0
    with output.open("rb") as file:
        for record in map(json.loads, file):
            if "error" in record:
                errors.append((record["error"], record["line"]))
            else:
                empty += not any(completion["text"] for completion in record["completions"])
    # Of errors that are equally common, the first.
    common, count = next(iter(Counter(error for error, _ in errors).most_common(1)), (None, 0))
    return BatchReport(
        output=str(output),
        lines=lines,
        errors=len(errors),
        resumed=resumed,
        new_tokens=new_tokens,
        seconds=seconds,
        tokens_per_second=new_tokens / seconds if seconds else 0.0,
        empty=empty,
        common_error=common,
        common_error_count=count,
        common_error_line=next((line for error, line in errors if error == common), None),
        settings_warnings=warnings,
    )
