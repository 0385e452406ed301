"""Answer prompts with a model: one as a single sequence, several as branches of one sequence."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pos2d.options import read_options, split_options, takes_options
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.engine.sampling import SamplingOptions
from pos2d.runtime.load import load_opened
from pos2d.runtime.opening.opened_model import open_model
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.options import ContextOptions, LayoutOptions, PromptOptions, request_options
from pos2d.runtime.text.requests import prepare_request, stream_columns
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedFrequencies, TrainedPositions
from pos2d.spec import Visibility

Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class RunReport:
    """Completions and times.

    ``first_seconds`` covers prefill and the first column, ``decode_seconds`` all later columns. ``tokens_per_second``
    is the rate of the later columns over all branches, 0 if there were none. ``cached_tokens`` are those of
    ``prompt_tokens`` whose keys and values were read from a file. ``sampling`` has the sampling options in
    force; ``settings`` says them in words. ``warnings`` name generation settings of the model that are not used, and
    positions that may be wrong; ``notes`` say what was decided by default.
    """

    visibility: Visibility
    sampling: dict[str, Any]
    settings: str
    completions: tuple[Completion, ...]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    load_seconds: float
    first_seconds: float
    decode_seconds: float
    tokens_per_second: float
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@takes_options(
    SamplingOptions, LayoutOptions, PromptOptions, ContextOptions, LoadOptions, BaseOptions, TrainedFrequencies
)
def run(
    model: str | Path | None = None,
    prompt: str | Sequence[str] = (),
    *,
    context: str | None = None,
    on_event: Listener | None = None,
    **options: Any,
) -> RunReport:
    """Answer every prompt; ``on_event`` is called with every token as soon as it is generated.

    ``model`` is an artifact or a plain model, as :func:`pos2d.load` takes it; ``base_model`` and ``lora`` in its place
    are added in memory, and nothing is written.
    ``context`` is prefilled once and seen by all prompts. Texts are rendered with the chat template if the artifact
    has one. The options are those of :meth:`pos2d.runtime.Model.stream` and of :func:`pos2d.load`.

    Raises:
        InputError: no model, no tokenizer, an empty prompt, prompts longer than the model, a ``cache_context`` of
            something else.
        UsageError: a value, device or type that cannot be used.
        StorageError: a ``cache_context`` that cannot be read or written.
    """
    started = time.monotonic()
    prompts = [prompt] if isinstance(prompt, str) else prompt
    loading, base = read_options(options, LoadOptions, BaseOptions)
    (trained,) = split_options(options, TrainedFrequencies)
    opened = open_model(model, base, TrainedPositions(**trained))
    answering = request_options(opened.directory, options)  # before loading, which takes longer
    answering.check_cache(context)
    loaded_model = load_opened(opened, loading)
    request = prepare_request(loaded_model, prompts, context, answering)
    loaded_model.backend.load_for(request.most_branches)
    prefix = PrefixCache(loaded_model.backend, request.spec, loaded_model.manifest.context_length)
    loaded = time.monotonic()
    columns: list[list[Event]] = []
    first: float | None = None
    for events in stream_columns(loaded_model, request, prefix):
        first = first or time.monotonic()
        columns.append(events)
        if on_event is not None:
            for event in events:
                on_event(event)
    ended = time.monotonic()
    first = first or ended
    first_column, *later_columns = map(_token_count, columns)
    later_tokens = sum(later_columns)
    return RunReport(
        visibility=request.spec.visibility,
        sampling=asdict(request.sampling),
        settings=request.sampling.summary(),
        completions=tuple(collect((event for events in columns for event in events), prompts)),
        prompt_tokens=request.encoded.prompt_tokens,
        cached_tokens=max(0, len(request.encoded.context or ()) - prefix.prefilled_tokens),
        new_tokens=first_column + later_tokens,
        load_seconds=loaded - started,
        first_seconds=first - loaded,
        decode_seconds=ended - first,
        tokens_per_second=later_tokens / (ended - first) if later_tokens else 0.0,
        warnings=(*opened.warnings, *request.sampling.warnings(opened.place)),
        notes=opened.notes,
    )


def _token_count(column: Sequence[Event]) -> int:
    return sum(event.token is not None for event in column)
