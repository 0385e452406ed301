"""Measure prefill and decoding speed of an artifact, and the share of the memory bandwidth that decoding uses."""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.errors import UsageError
from pos2d.families import Dimensions
from pos2d.layout import build_layout
from pos2d.manifest import Manifest
from pos2d.memory_costs import kv_cache_bytes
from pos2d.options import read_options, takes_options
from pos2d.progress import Progress
from pos2d.runtime.backends.memory import WEIGHT_ENDINGS
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.decode import prefill
from pos2d.runtime.load import load_opened
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import open_model
from pos2d.threads import usable_cores

# Tokens of the prompt whose first token ends the load time.
FIRST_PROMPT_TOKENS = 16
SEED = 20240601
# The size of the array that is read to measure the memory bandwidth: far larger than any processor cache.
BANDWIDTH_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Medians over the rounds for ``branches`` answers side by side after one prompt.

    ``prefill_seconds`` is the time until the prompt has its logits, ``first_token_seconds`` the time until every branch
    has its first token, ``step_ms`` that of one decode step, and ``answers_seconds`` the total.
    ``bandwidth_share`` is the rate at which a step reads weights and cache as a share of the memory bandwidth; it is
    absent on a GPU, whose bandwidth is not measured.
    """

    branches: int
    prefill_seconds: float
    first_token_seconds: float
    step_ms: float
    tokens_per_second: float
    answers_seconds: float
    bandwidth_share: float | None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Times of one artifact; ``format`` is its kind and precision, such as ``onnx int8``.

    ``load_seconds`` includes the import of libraries, loading, and the first token after a prompt of at most 16 tokens.
    ``memory_bytes_per_second`` is the measured bandwidth of all cores together, ``peak_bytes`` the peak memory of the
    process.
    """

    model: str
    format: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    load_seconds: float
    memory_bytes_per_second: float
    peak_bytes: int
    rows: tuple[BenchRow, ...]


@takes_options(LoadOptions)
def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    branches: Sequence[int] = (1, 2, 4, 8, 16),
    rounds: int = 3,
    **loading: Any,
) -> BenchReport:
    """Time greedy decoding after a prompt of random tokens, for each number of ``branches`` that share the prompt.

    ``loading`` are the options of :func:`pos2d.load`.

    Raises:
        UsageError: a number below 1 (2 for tokens), or more positions than the model has.
        InputError: no model.
    """
    started = time.perf_counter()
    (options,) = read_options(loading, LoadOptions)
    opened = open_model(model)
    manifest = opened.manifest
    _check(manifest, prompt_tokens, new_tokens, branches, rounds)
    loaded = load_opened(opened, options)
    prompt: list[int] = np.random.default_rng(SEED).integers(0, manifest.vocab_size, prompt_tokens).tolist()
    next(loaded.stream_ids([prompt[:FIRST_PROMPT_TOKENS]], max_new_tokens=1, ignore_eos=True))
    load_seconds = time.perf_counter() - started
    times: dict[int, list[list[float]]] = {}
    prefills: dict[int, list[float]] = {}
    with Progress("measuring", len(branches) * (rounds + 1)) as progress:
        for count in sorted(branches):
            times[count], prefills[count] = [], []
            for _ in range(rounds + 1):
                prefills[count].append(_prefill_time(loaded, prompt, count))
                times[count].append(_column_times(loaded, prompt, count, new_tokens))
                progress.advance()
    peak = peak_memory()
    bandwidth = memory_bandwidth()
    # If weights are converted while they are loaded, the sizes of the files are not what a step reads.
    known = loaded.backend.device == "cpu" and not loading.get("quant") and loading.get("dtype") in (None, "auto")
    rows = (
        _row(loaded, count, prompt_tokens, prefills[count][1:], rounds_of_count[1:], bandwidth if known else None)
        for count, rounds_of_count in times.items()
    )
    return BenchReport(
        model=str(model),
        format=f"{manifest.kind} {_precision(manifest, options)}",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        load_seconds=load_seconds,
        memory_bytes_per_second=bandwidth,
        peak_bytes=peak,
        rows=tuple(rows),
    )


def memory_bandwidth() -> float:
    """Bytes per second that all cores read together: the fastest of a few passes over one large array."""
    cores = usable_cores()
    array = np.ones(BANDWIDTH_BYTES // 8)
    parts = np.array_split(array, cores)
    with ThreadPoolExecutor(cores) as workers:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            list(workers.map(np.max, parts))
            times.append(time.perf_counter() - started)
    return array.nbytes / min(times)


def peak_memory() -> int:
    """The peak memory of this process in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _check(manifest: Manifest, prompt_tokens: int, new_tokens: int, branches: Sequence[int], rounds: int) -> None:
    for name, value, minimum in (
        ("prompt_tokens", prompt_tokens, 2),
        ("new_tokens", new_tokens, 2),
        ("branches", min(branches, default=0), 1),
        ("rounds", rounds, 1),
    ):
        if value < minimum:
            raise UsageError(f"`{name}` {value} must be at least {minimum}")
    # Isolated branches have the same positions, columnar branches have different ones.
    side_by_side = 1 if manifest.rope_2d.visibility == "isolated" else max(branches)
    needed = prompt_tokens + side_by_side * new_tokens
    if needed > manifest.context_length:
        raise UsageError(
            f"a prompt of {prompt_tokens} and {side_by_side} answers of {new_tokens} tokens take {needed} positions, "
            f"the model has {manifest.context_length}; use fewer tokens or branches"
        )


def _prefill_time(model: Model, prompt: Sequence[int], branches: int) -> float:
    """Seconds for the prompt alone, with the last token of it in every branch."""
    *context, last = prompt
    layout = build_layout([[last]] * branches, model.manifest.rope_2d, context)
    model.backend.expect_branches(branches)
    started = time.perf_counter()
    prefill(model.backend, layout, model.backend.new_cache(len(layout)))
    return time.perf_counter() - started


def _column_times(model: Model, prompt: Sequence[int], branches: int, new_tokens: int) -> list[float]:
    """Seconds for each column of tokens; the first includes the prompt."""
    *context, last = prompt
    marks = [time.perf_counter()]
    columns = model.stream_ids([[last]] * branches, context, max_new_tokens=new_tokens, ignore_eos=True)
    for _ in columns:
        marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


def _row(
    model: Model,
    branches: int,
    prompt_tokens: int,
    prefills: Sequence[float],
    times: Sequence[Sequence[float]],
    bandwidth: float | None,
) -> BenchRow:
    first = statistics.median(columns[0] for columns in times)
    step = statistics.median(statistics.median(columns[1:]) for columns in times)
    step_bytes = _step_bytes(model, prompt_tokens + branches * len(times[0]) // 2)
    return BenchRow(
        branches=branches,
        prefill_seconds=statistics.median(prefills),
        first_token_seconds=first,
        step_ms=1e3 * step,
        tokens_per_second=branches / step,
        answers_seconds=statistics.median(map(sum, times)),
        bandwidth_share=None if bandwidth is None else step_bytes / step / bandwidth,
    )


def _step_bytes(model: Model, positions: int) -> int:
    """The bytes that a decode step has to read: all weights, and the keys and values of ``positions`` tokens."""
    manifest = model.manifest
    if manifest.graph is not None:
        sizes = manifest.graph.sizes
    else:
        path = model.path / "config.json"
        sizes = Dimensions.from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    weights: int = sum(facts["bytes"] for name, facts in manifest.files.items() if name.endswith(WEIGHT_ENDINGS))
    return weights + kv_cache_bytes(sizes, positions, manifest.dtype)


def _precision(manifest: Manifest, options: LoadOptions) -> str:
    """How the weights are stored, or what they are converted to while they are loaded."""
    if manifest.recipe is not None:
        return manifest.recipe.name
    return options.quant or (manifest.dtype if options.dtype == "auto" else options.dtype)
