"""Answer prompts with an artifact: one as ordinary text, several as branches of one sequence."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from pos2d.runtime.backends.options import LoadFlags
from pos2d.runtime.engine.sampling import SamplingFlags, resolve_sampling
from pos2d.runtime.flags import check_known, part_of
from pos2d.runtime.load import load
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.requests import GenerationFlags, prepare, stream
from pos2d.spec import Visibility

Listener = Callable[[Event], None]


class RunFlags(GenerationFlags, LoadFlags, total=False):
    """How an artifact is loaded, how answers are laid out, and how they are written."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """Answers and times: ``first_seconds`` for the prompts and the first column, ``decode_seconds`` for the rest.

    ``tokens_per_second`` is the rate of that rest, over all branches; 0 where there was none. ``sampling`` are the
    options that were in force, and ``settings`` the same in words.
    """

    visibility: Visibility
    sampling: dict[str, Any]
    settings: str
    completions: tuple[Completion, ...]
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    first_seconds: float
    decode_seconds: float
    tokens_per_second: float


def run(
    artifact: str | Path,
    prompt: str | Sequence[str],
    *,
    context: str | None = None,
    on_event: Listener | None = None,
    **flags: Unpack[RunFlags],
) -> RunReport:
    """Answer every prompt; ``on_event`` hears the answers token by token while they are written.

    ``context`` is read once and seen by all prompts. Texts go through the artifact's chat template where it has one.
    The other arguments are those of :meth:`pos2d.runtime.Model.stream` and of :func:`pos2d.load`.

    Raises:
        InputError: not an artifact, no tokenizer, an empty prompt, prompts longer than the model.
        UsageError: a number, device or type that cannot be used.
    """
    started = time.monotonic()
    check_known(RunFlags, flags)
    prompt = [prompt] if isinstance(prompt, str) else prompt
    resolve_sampling(Path(artifact), part_of(SamplingFlags, flags))  # what is wrong with it is said before loading
    model = load(artifact, **part_of(LoadFlags, flags))
    asked = prepare(model, prompt, context, part_of(GenerationFlags, flags))
    loaded = time.monotonic()
    heard: list[Event] = []
    first: float | None = None
    for event in stream(model, asked):
        first = first or time.monotonic()
        heard.append(event)
        if on_event is not None:
            on_event(event)
    ended = time.monotonic()
    first = first or ended
    in_first_column = sum(event.token is not None for event in heard[: asked.size][: len(prompt)])
    new_tokens = sum(event.token is not None for event in heard)
    later = new_tokens - in_first_column
    return RunReport(
        visibility=asked.spec.visibility,
        sampling=asdict(asked.sampling),
        settings=asked.sampling.summary(),
        completions=tuple(collect(heard, prompt)),
        prompt_tokens=asked.prompt_tokens,
        new_tokens=new_tokens,
        load_seconds=loaded - started,
        first_seconds=first - loaded,
        decode_seconds=ended - first,
        tokens_per_second=later / (ended - first) if later else 0.0,
    )
