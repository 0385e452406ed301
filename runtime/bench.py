"""How fast an artifact reads and writes on this machine, and how near that comes to what its memory allows."""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Unpack

import numpy as np

from pos2d.errors import UsageError
from pos2d.families import Dimensions
from pos2d.footprint import cache_bytes
from pos2d.manifest import Manifest, read_manifest
from pos2d.progress import Progress
from pos2d.runtime.backends.memory import WEIGHT_ENDINGS
from pos2d.runtime.backends.options import LoadFlags
from pos2d.runtime.load import load
from pos2d.runtime.model.model import Model

FIRST_PROMPT = 16
SEED = 20240601
# What is read to measure the memory: far more than any cache holds.
READ_BYTES = 1 << 28
TABLE_HEAD = ("branches", "prefill s", "first token s", "step ms", "tokens/s", "answers s", "bandwidth")


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Medians over the rounds, for so many ``branches`` side by side over one prompt.

    ``prefill_seconds``: reading the prompt without its last token; ``first_token_seconds``: until every branch has its
    first token; ``step_ms``: one more for each; ``answers_seconds``: everything. ``bandwidth_share``: the bytes of
    weights and cache that a step reads, by its time and by what the memory gives; the memory of a card is not measured.
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
    """``load_seconds``: from nothing to the first token after a prompt of at most 16, libraries with it.

    ``memory_bytes_per_second``: what all cores read together, measured; ``peak_bytes``: of the process at its largest.
    """

    artifact: str
    what: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    load_seconds: float
    memory_bytes_per_second: float
    peak_bytes: int
    rows: tuple[BenchRow, ...]

    def lines(self) -> list[str]:
        """A table for people."""
        cells = [TABLE_HEAD, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return [
            f"{self.artifact}: {self.what}; prompt of {self.prompt_tokens}, {self.new_tokens} tokens an answer, "
            f"medians of {self.rounds}",
            *("  ".join(map(str.rjust, row, widths)) for row in cells),
            f"load to first token {self.load_seconds:.2f} s, peak memory {self.peak_bytes / 1e6:.0f} MB, "
            f"memory reads {self.memory_bytes_per_second / 1e9:.1f} GB/s",
        ]


def bench(
    artifact: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    branches: Sequence[int] = (1, 2, 4, 8, 16),
    rounds: int = 3,
    **loading: Unpack[LoadFlags],
) -> BenchReport:
    """Time ``artifact`` on random tokens, greedy, for every number of ``branches`` that share the prompt.

    ``loading`` are the flags of :func:`pos2d.load`.

    Raises:
        UsageError: a number below 1 (2 for the tokens), or more positions than the model has.
        InputError: not an artifact.
    """
    started = time.perf_counter()
    manifest = read_manifest(Path(artifact))
    _check(manifest, prompt_tokens, new_tokens, branches, rounds)
    model = load(artifact, **loading)
    draw = np.random.default_rng(SEED)
    prompt: list[int] = draw.integers(0, manifest.vocab_size, prompt_tokens).tolist()
    next(model.stream_ids([prompt[:FIRST_PROMPT]], max_new_tokens=1, ignore_eos=True))
    loaded = time.perf_counter() - started
    times: dict[int, list[list[float]]] = {}
    with Progress("measuring", len(branches) * (rounds + 1)) as progress:
        for count in sorted(branches):
            times[count] = []
            for _ in range(rounds + 1):
                times[count].append(_run(model, prompt, count, new_tokens))
                progress.advance()
    peak = peak_memory()
    speed = memory_speed()
    # Of weights that were made anew while they were loaded, the file does not tell the size.
    known = model.backend.device == "cpu" and not loading.get("quant") and loading.get("dtype", "auto") == "auto"
    rows = (
        _row(model, count, prompt_tokens, new_tokens, measured[1:], speed if known else None)
        for count, measured in times.items()
    )
    return BenchReport(
        artifact=str(artifact),
        what=f"{manifest.kind} {_precision(manifest)}",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        load_seconds=loaded,
        memory_bytes_per_second=speed,
        peak_bytes=peak,
        rows=tuple(rows),
    )


def memory_speed() -> float:
    """Bytes that all cores together read in a second: the best of a few passes over one large array each."""
    cores = os.cpu_count() or 1
    array = np.ones(READ_BYTES // 8)
    parts = np.array_split(array, cores)
    with ThreadPoolExecutor(cores) as workers:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            list(workers.map(np.max, parts))
            times.append(time.perf_counter() - started)
    return array.nbytes / min(times)


def peak_memory() -> int:
    """Bytes that this process held at most."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _check(manifest: Manifest, prompt_tokens: int, new_tokens: int, branches: Sequence[int], rounds: int) -> None:
    for flag, number, least in (
        ("--prompt-tokens", prompt_tokens, 2),
        ("--new-tokens", new_tokens, 2),
        ("--branches", min(branches, default=0), 1),
        ("--rounds", rounds, 1),
    ):
        if number < least:
            raise UsageError(f"{flag} {number} must be at least {least}")
    side_by_side = 1 if manifest.rope_2d.visibility == "isolated" else max(branches)  # these share their positions
    needed = prompt_tokens + side_by_side * new_tokens
    if needed > manifest.context_length:
        raise UsageError(
            f"a prompt of {prompt_tokens} and {side_by_side} answers of {new_tokens} tokens take {needed} positions, "
            f"the model has {manifest.context_length}; ask for fewer"
        )


def _run(model: Model, prompt: Sequence[int], branches: int, new_tokens: int) -> list[float]:
    """Seconds that every column took, the first with the prompt."""
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
    new_tokens: int,
    times: Sequence[Sequence[float]],
    speed: float | None,
) -> BenchRow:
    first = statistics.median(columns[0] for columns in times)
    step = statistics.median(statistics.median(columns[1:]) for columns in times)
    read = _step_bytes(model, prompt_tokens + branches * new_tokens // 2)
    return BenchRow(
        branches=branches,
        prefill_seconds=max(0.0, first - step),
        first_token_seconds=first,
        step_ms=1e3 * step,
        tokens_per_second=branches / step,
        answers_seconds=statistics.median(map(sum, times)),
        bandwidth_share=None if speed is None else read / step / speed,
    )


def _step_bytes(model: Model, positions: int) -> int:
    """What a step reads at least: every weight, and the keys and values of ``positions`` tokens."""
    manifest = model.manifest
    if manifest.graph is not None:
        sizes = Dimensions(**manifest.graph["sizes"])
    else:
        path = model.path / "config.json"
        sizes = Dimensions.from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    weights: int = sum(facts["bytes"] for name, facts in manifest.files.items() if name.endswith(WEIGHT_ENDINGS))
    return weights + cache_bytes(sizes, positions, manifest.dtype)


def _precision(manifest: Manifest) -> str:
    recipe = manifest.graph_quant or manifest.quant
    return manifest.dtype if recipe is None else recipe.name


def _cells(row: BenchRow) -> tuple[str, ...]:
    return (
        str(row.branches),
        f"{row.prefill_seconds:.3f}",
        f"{row.first_token_seconds:.3f}",
        f"{row.step_ms:.2f}",
        f"{row.tokens_per_second:.1f}",
        f"{row.answers_seconds:.2f}",
        "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
    )
