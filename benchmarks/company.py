"""Whether a request gets the same tokens alone and among others that come and go, on both backends in float32.

Prompts are pieces of the demo texts of many lengths; each is decoded greedily by itself, and again in a scheduler in
which 15 other requests always run, which come and go at random steps and of which some have several branches.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from pos2d import exporter, runtime
from pos2d.layout import Layout, build_layout
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import SequenceState
from pos2d.runtime.scheduling.pace import MeasuredPieces
from pos2d.runtime.scheduling.scheduler import Limits, Scheduler

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "demo_data"
RUNNING = 16


@dataclass(frozen=True, slots=True)
class Row:
    """``same`` of ``requests`` had the tokens that they have alone; ``cached_tokens`` were copied from others."""

    backend: str
    requests: int
    same: int
    cached_tokens: int


@click.command()
@click.option("--base-model", default=str(ROOT / "demo" / "base"), show_default="demo/base")
@click.option("-n", "--requests", type=int, default=100, show_default=True)
@click.option("-g", "--new-tokens", type=int, default=32, show_default=True, help="Of every answer.")
@click.option("--json", "as_json", is_flag=True)
def check(base_model: str, requests: int, new_tokens: int, as_json: bool) -> None:
    """Merge, export and compare; everything is made in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        merged, onnx = Path(directory) / "merged", Path(directory) / "onnx"
        lora = ROOT / "examples" / "demo_adapter" / "lora.pth"
        exporter.merge(base_model, lora, merged, rope_2d_ratio=1.0, dtype="float32")
        exporter.export(merged, onnx, no_verify=True)
        rows = [
            compare(name, runtime.load(path, dtype="float32"), requests, new_tokens)
            for name, path in (("onnx", onnx), ("torch", merged))
        ]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        click.echo(f"{row.backend:6} {row.same} of {row.requests} the same; {row.cached_tokens} prompt tokens copied")


def compare(name: str, model: runtime.Model, requests: int, new_tokens: int) -> Row:
    """Decode every prompt alone and in company."""
    random = np.random.default_rng(0)
    prompts = list(pieces(model, requests, random))
    alone = [model.generate_ids([prompt], max_new_tokens=new_tokens)[0] for prompt in prompts]
    scheduler = Scheduler(
        model.backend,
        Limits(4 * RUNNING, 10**6, 10**5),
        MeasuredPieces(model.backend.prefill_chunk),
        keeps_prompts=True,
    )
    others = company(model, prompts, random)
    asked, answers, cached = dict[int, int](), [list[int]() for _ in prompts], 0
    following = 0
    while following < requests or not scheduler.is_idle:
        # The requests that are compared come one after the other, as soon as fewer than 16 run.
        while following < requests and scheduler.waiting + len(scheduler.running) < RUNNING:
            if random.random() < 1 / 3:
                layout = build_layout([prompts[following]], model.manifest.rope_2d)
                asked[scheduler.add(sequence(model, layout, new_tokens))] = following
                following += 1
            else:
                scheduler.add(sequence(model, next(others), int(random.integers(1, 2 * new_tokens))))
        for progress in scheduler.step():
            if progress.error is not None:
                raise progress.error
            if progress.number in asked and progress.column is not None and progress.column.tokens[0] is not None:
                answers[asked[progress.number]].append(progress.column.tokens[0])
                cached += progress.cached_tokens * (len(answers[asked[progress.number]]) == 1)
    return Row(name, requests, sum(map(list.__eq__, alone, answers)), cached)


def sequence(model: runtime.Model, layout: Layout, new_tokens: int) -> SequenceState:
    samplers = [Sampler(Sampling(max_new_tokens=new_tokens), (k,), model.manifest.eos_token_ids) for k in layout.last]
    return SequenceState(layout, samplers, model.manifest.context_length)


def pieces(model: runtime.Model, count: int, random: np.random.Generator) -> Iterator[list[int]]:
    """Pieces of 4 to 200 tokens of the demo texts."""
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(DATA.glob("*.jsonl")))
    ids: list[int] = model.tokenizer(text[:200_000], verbose=False).input_ids
    for _ in range(count):
        length, start = int(random.integers(4, 200)), int(random.integers(len(ids) - 200))
        yield ids[start : start + length]


def company(model: runtime.Model, prompts: list[list[int]], random: np.random.Generator) -> Iterator[Layout]:
    """Requests of one branch and of several, of which some begin as the compared ones do."""
    while True:
        first, second = (prompts[int(random.integers(len(prompts)))] for _ in range(2))
        branches = [second[: int(random.integers(1, len(second)))] for _ in range(int(random.choice([1, 1, 1, 3])))]
        yield build_layout(branches, model.manifest.rope_2d, random.choice([0, 1]) * first or None)


if __name__ == "__main__":
    check()
