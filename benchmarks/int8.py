"""Decoding with int8 weights beside bfloat16 and beside bitsandbytes' own kernel: milliseconds a step, and memory.

All runs of a model are interleaved in one process, and medians are taken. The peers are transformers' ``generate`` with
the merged weights in bfloat16, which speeds are ratios to, and with the int8 artifact on bitsandbytes' kernel; all
prompts are one batch there. Beside every speed stands how far its logits are from the merged model in float32 (mean KL
and top-1 over a probe; transformers' are those of ours with the same weights and kernels), and for loading how much
memory a fresh process takes for the artifact's files. The same program runs on a CUDA card (``--device cuda``), where
it prints the peak of its memory too.
"""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from columns import Ids, Timed, our_engine
from random_bases import SHAPES, make_inputs

from pos2d import exporter, runtime
from pos2d.layout import build_layout
from pos2d.manifest import read_manifest
from pos2d.runtime.engine.decode import forward
from pos2d.runtime.evaluation.parity import compare

PEER = "transformers bfloat16"
ENGINES = (PEER, "transformers int8", "bfloat16", "int8 weight-only", "int8 bnb")
ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import json, sys
import psutil, runtime, runtime.backends.torch_backend
if sys.argv[2] == "bnb":
    from pos2d.runtime.backends.torch.bitsandbytes_library import bitsandbytes
    bitsandbytes()
before = psutil.Process().memory_info().rss
runtime.load(sys.argv[1], device="cpu", int8_kernel=sys.argv[2])
# Not getrusage: that begins with the peak of the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps(peak - before))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """``times_peer``: how much faster than transformers in bfloat16; ``load_times_file``: growth of the process while
    it loads, at its peak, by the size of the weights; ``peak_gb`` of a card's memory."""

    model: str
    engine: str
    branches: int
    step_ms: float
    tokens_per_second: float
    times_peer: float | None
    mean_kl: float
    top1: float
    load_times_file: float | None = None
    peak_gb: float | None = None


@click.command()
@click.option("-m", "--model", type=click.Choice(["demo", *SHAPES]), multiple=True, default=("demo", "0.5b"))
@click.option("--layers", type=int, help="Fewer layers of a shape, where memory is short.")
@click.option("-p", "--prompt-tokens", type=int, default=32, show_default=True, help="Of every branch.")
@click.option("-g", "--new-tokens", type=int, default=24, show_default=True, help="Of every branch.")
@click.option("-n", "--branches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("-r", "--repeats", type=int, default=5, show_default=True)
@click.option("-e", "--engine", type=click.Choice(ENGINES), multiple=True, default=ENGINES, help="All by default.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def bench(
    model: tuple[str, ...],
    layers: int | None,
    prompt_tokens: int,
    new_tokens: int,
    branches: tuple[int, ...],
    repeats: int,
    engine: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Make the artifacts in a temporary directory, time them, print a row for each."""
    rows: list[Row] = []
    for name in model:
        with tempfile.TemporaryDirectory() as place:
            base, lora, ratio = inputs(name, Path(place), layers)
            artifacts = make(base, lora, ratio, Path(place))
            rows += measure(name, artifacts, prompt_tokens, new_tokens, branches, repeats, engine, device)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    click.echo(
        f"{'model':6} {'engine':24} {'branches':>8} {'ms/step':>8} {'tokens/s':>9} {'x peer':>7} {'mean KL':>8} "
        f"{'top-1':>6} {'load/file':>9} {'peak GB':>8}"
    )
    for row in rows:
        times, load, peak = (
            "-" if x is None else f"{x:.2f}" for x in (row.times_peer, row.load_times_file, row.peak_gb)
        )
        click.echo(
            f"{row.model:6} {row.engine:24} {row.branches:8} {row.step_ms:8.1f} {row.tokens_per_second:9.1f} "
            f"{times:>7} {row.mean_kl:8.1e} {row.top1:6.1%} {load:>9} {peak:>8}"
        )


def inputs(name: str, place: Path, layers: int | None) -> tuple[Path, Path, float]:
    """A base, an adapter and its ratio."""
    if name == "demo":
        return ROOT / "demo" / "base", ROOT / "examples" / "demo_adapter" / "lora.pth", 1.0
    make_inputs(place, SHAPES[name] | ({"num_hidden_layers": layers} if layers else {}))
    return place / "base", place / "lora.pth", 0.5


def make(base: Path, lora: Path, ratio: float, place: Path) -> dict[str, Path]:
    merged, int8 = place / "merged", place / "int8"
    exporter.merge(base, lora, merged, rope_2d_ratio=ratio, dtype="bfloat16")
    exporter.export(
        None, int8, format="bnb", quant="8bit", base_model=base, lora=lora, rope_2d_ratio=ratio, dtype="bfloat16"
    )
    return {"merged": merged, "int8": int8}


def measure(
    name: str,
    artifacts: dict[str, Path],
    prompt_tokens: int,
    new_tokens: int,
    branches: Sequence[int],
    repeats: int,
    chosen: Sequence[str],
    device: str,
) -> list[Row]:
    agreement = agreements(artifacts, device)
    loads = {"int8 weight-only": load_growth(artifacts["int8"], "weight-only")}
    loads |= {"int8 bnb": load_growth(artifacts["int8"], "bnb")}
    makers: dict[str, Callable[[], Timed]] = {
        "transformers bfloat16": lambda: transformers_engine(artifacts["merged"], device),
        "transformers int8": lambda: transformers_engine(artifacts["int8"], device),
        "bfloat16": lambda: our_engine(artifacts["merged"], device=device),
        "int8 weight-only": lambda: our_engine(artifacts["int8"], device=device, int8_kernel="weight-only"),
        "int8 bnb": lambda: our_engine(artifacts["int8"], device=device, int8_kernel="bnb", dtype="bfloat16"),
    }
    engines = {engine: makers[engine]() for engine in chosen}
    vocabulary = read_manifest(artifacts["int8"]).vocab_size
    rows: list[Row] = []
    for count in branches:
        prompts = np.random.default_rng(count).integers(5, vocabulary, (count, prompt_tokens)).tolist()
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        peaks = dict.fromkeys(engines, 0.0)
        for turn in range(repeats + 1):
            for engine, timed in engines.items():
                spent, peaks[engine] = with_peak(timed, prompts, new_tokens, device)
                if turn > 0:  # the first one warms up
                    seconds[engine].append(spent)
        medians = {engine: statistics.median(times) for engine, times in seconds.items()}
        steps = new_tokens - 1
        rows += [
            Row(
                model=name,
                engine=engine,
                branches=count,
                step_ms=1e3 * median / steps,
                tokens_per_second=count * steps / median,
                times_peer=medians[PEER] / median if PEER in medians else None,
                mean_kl=agreement[engine][0],
                top1=agreement[engine][1],
                load_times_file=loads.get(engine),
                peak_gb=peaks[engine] / 1e9 if device != "cpu" else None,
            )
            for engine, median in medians.items()
        ]
    return rows


def transformers_engine(merged: Path, device: str) -> Timed:
    """``generate`` of a batch, reading the prompts not counted."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel("ERROR")
    model: Any = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True, dtype=torch.bfloat16)
    if device != "cpu":
        model.to(device)

    def seconds(prompts: Ids, new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=device)
        started = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        made.cpu()
        return time.perf_counter() - started

    return lambda prompts, new_tokens: seconds(prompts, new_tokens) - seconds(prompts, 1)


def with_peak(timed: Timed, prompts: Ids, new_tokens: int, device: str) -> tuple[float, float]:
    """Seconds, and the bytes that a card had in use at most, with the weights of all chosen engines."""
    if device == "cpu":
        return timed(prompts, new_tokens), 0.0
    import torch

    torch.cuda.reset_peak_memory_stats()
    spent = timed(prompts, new_tokens)
    return spent, float(torch.cuda.max_memory_allocated())


def agreements(artifacts: dict[str, Path], device: str) -> dict[str, tuple[float, float]]:
    """Mean KL to the merged model in float32, and the share of equal top tokens, over four branches after a context."""
    reference = runtime.load(artifacts["merged"], device="cpu", dtype="float32")
    draw = np.random.default_rng(0)
    lengths = (12, 7, 16, 9)
    prompts = [draw.integers(5, reference.manifest.vocab_size, length).tolist() for length in lengths]
    layout = build_layout(prompts, reference.manifest.rope_2d, list(range(40, 64)))
    expected = forward(reference.backend, layout, len(layout))
    del reference
    found: dict[str, tuple[float, float]] = {}
    for engine, artifact, flags in (
        ("bfloat16", "merged", {}),
        ("int8 weight-only", "int8", {"int8_kernel": "weight-only"}),
        ("int8 bnb", "int8", {"int8_kernel": "bnb", "dtype": "bfloat16"}),
    ):
        model = runtime.load(artifacts[artifact], device=device, **flags)
        case = compare(engine, expected, forward(model.backend, layout, len(layout)))
        found[engine] = (case.mean_kl, case.top1_agreement)
    return found | {"transformers bfloat16": found["bfloat16"], "transformers int8": found["int8 bnb"]}


def load_growth(artifact: Path, kernel: str) -> float:
    """Peak growth of a fresh process while it loads, by the bytes of the weights; libraries are imported before."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(artifact), kernel], capture_output=True, text=True, check=True
    )
    weights = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    return float(json.loads(done.stdout)) / weights


if __name__ == "__main__":
    bench()
