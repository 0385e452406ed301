"""Decoding speed by number of branches: ONNX and torch artifacts beside transformers' own generate.

Prints one row a backend and number of branches: milliseconds a step, tokens a second over all branches, and the ratio
to transformers answering the same prompts one after the other with the same merged weights in the same run. Runs are
interleaved and medians are taken; a speed stands beside the largest logit difference to the merged float32 model.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from columns import Ids, Timed, our_engine

from pos2d import exporter, runtime

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Row:
    backend: str
    branches: int
    step_ms: float
    tokens_per_second: float
    times_transformers: float
    max_rel_diff: float


@click.command()
@click.option("--base-model", default=str(ROOT / "demo" / "base"), show_default="demo/base")
@click.option("--lora", default=str(ROOT / "examples" / "demo_adapter" / "lora.pth"), show_default="the demo adapter")
@click.option("--rope-2d-ratio", type=float, default=1.0, show_default=True)
@click.option("-p", "--prompt-tokens", type=int, default=32, show_default=True, help="Of every branch.")
@click.option("-g", "--new-tokens", type=int, default=24, show_default=True, help="Of every branch.")
@click.option("-n", "--branches", type=int, multiple=True, default=(1, 2, 4, 8), show_default=True)
@click.option("-r", "--repeats", type=int, default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def bench(
    base_model: str,
    lora: str,
    rope_2d_ratio: float,
    prompt_tokens: int,
    new_tokens: int,
    branches: tuple[int, ...],
    repeats: int,
    as_json: bool,
) -> None:
    """Merge, export and time; everything is made in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        merged, onnx = Path(directory) / "merged", Path(directory) / "onnx"
        exporter.merge(base_model, lora, merged, rope_2d_ratio=rope_2d_ratio)
        exporter.export(merged, onnx, no_verify=True)
        parity = {"onnx": runtime.verify(onnx, merged).max_rel_diff or 0.0, "torch": 0.0, "transformers": 0.0}
        runs = {
            "transformers": _transformers(merged),
            "torch": our_engine(merged, dtype="float32"),
            "onnx": our_engine(onnx, dtype="float32"),
        }
        vocabulary = runtime.load(onnx).manifest.vocab_size
        rows = [row for n in branches for row in _rows(runs, parity, n, vocabulary, prompt_tokens, new_tokens, repeats)]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    click.echo(
        f"{'backend':13} {'branches':>8} {'ms/step':>8} {'tokens/s':>9} {'x transformers':>14} {'rel. diff':>10}"
    )
    for row in rows:
        click.echo(
            f"{row.backend:13} {row.branches:8} {row.step_ms:8.1f} {row.tokens_per_second:9.1f} "
            f"{row.times_transformers:14.2f} {row.max_rel_diff:10.1e}"
        )


def _rows(
    runs: dict[str, Timed],
    parity: dict[str, float],
    branches: int,
    vocabulary: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> list[Row]:
    draw = np.random.default_rng(branches)
    prompts = draw.integers(0, vocabulary, (branches, prompt_tokens)).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, timed in runs.items():
            seconds[name].append(timed(prompts, new_tokens))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    made = branches * (new_tokens - 1)
    return [
        Row(
            backend=name,
            branches=branches,
            step_ms=1e3 * median / (new_tokens - 1),
            tokens_per_second=made / median,
            times_transformers=medians["transformers"] / median,
            max_rel_diff=parity[name],
        )
        for name, median in medians.items()
    ]


def _transformers(merged: Path) -> Timed:
    """Seconds of the same number of tokens with ``generate``, one prompt after the other, reading them not counted."""
    import torch

    model = runtime.load(merged, dtype="float32").backend._model  # type: ignore[attr-defined]

    def seconds(prompt: list[int], new_tokens: int) -> float:
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - started

    def timed(prompts: Ids, new_tokens: int) -> float:
        return sum(seconds(prompt, new_tokens) - seconds(prompt, 1) for prompt in prompts)

    return timed


if __name__ == "__main__":
    bench()
