"""Merging beside a raw copy of the same bytes and beside PEFT: seconds, megabytes a second, peak memory.

Every run is a process of its own: a copy with fsync, our command, and PEFT's load, merge_and_unload and save_pretrained
(which does not fsync), in an order that rotates, so that nobody always finds the memory that another one freed; medians
are taken. The base is random bfloat16 of a public model's shape, and the adapter covers q and o with rank 16, as the
trainer's does. Agreement stands beside speed: how many of the changed weights PEFT, which adds in bfloat16, stores as
ours, and by how many steps of bfloat16 the others differ at most.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from random_bases import SHAPES, TOUCHED, make_inputs

ROOT = Path(__file__).resolve().parent.parent
COPY = """
import json, os, shutil, sys, time
started = time.perf_counter()
os.makedirs(sys.argv[2])
for name in sorted(os.listdir(sys.argv[1])):
    target = os.path.join(sys.argv[2], name)
    shutil.copyfile(os.path.join(sys.argv[1], name), target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
print(json.dumps({"seconds": time.perf_counter() - started}))
"""
OURS = """
import sys, torch, cli
flags = ["--base-model", sys.argv[1], "-o", sys.argv[2], "--lora", sys.argv[3], "--json"]
sys.argv = ["pos2d", "merge", *flags]
cli.main()
"""
PEFT = """
import json, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[4]).merge_and_unload().save_pretrained(sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """``seconds`` after imports, ``process_seconds`` with them; ``peak_rss`` in bytes; ``equal`` is the share of the
    changed weights that are the same as ours, ``steps`` the largest difference of the others in steps of bfloat16."""

    shape: str
    tool: str
    seconds: float
    process_seconds: float
    mb_per_second: float
    times_copy: float
    peak_rss: int
    equal: float | None = None
    steps: int | None = None


@click.command()
@click.option("-s", "--shape", type=click.Choice(list(SHAPES)), multiple=True, default=tuple(SHAPES), show_default=True)
@click.option("--layers", type=int, help="Fewer layers, where the disk or the memory is short.")
@click.option("-r", "--repeats", type=int, default=3, show_default=True)
@click.option("--without-peft", is_flag=True, help="PEFT holds the whole model in memory.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where to work; three times the model's size.")
@click.option("--json", "as_json", is_flag=True)
def bench(
    shape: tuple[str, ...],
    layers: int | None,
    repeats: int,
    without_peft: bool,
    directory: Path | None,
    as_json: bool,
) -> None:
    """Make the bases, time the tools, print a row for each."""
    rows: list[Row] = []
    for name in shape:
        sizes = SHAPES[name] | ({"num_hidden_layers": layers} if layers else {})
        with tempfile.TemporaryDirectory(dir=directory) as place:
            # In a process of its own: a child starts with the peak memory of its parent.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
                size, touched = maker.submit(make_inputs, Path(place), sizes).result()
            layer_count = sizes["num_hidden_layers"]
            described = f"{size / 1e6:.0f} MB, {layer_count} layers, largest touched tensor {touched / 1e6:.1f} MB"
            click.echo(f"{name}: {described}", err=True)
            rows += measure(name, Path(place), size, repeats, not without_peft)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    click.echo(
        f"{'shape':6} {'tool':5} {'seconds':>8} {'with import':>12} {'MB/s':>7} {'x copy':>7} {'peak MB':>8}  as ours"
    )
    for row in rows:
        agreement = "" if row.equal is None else f"{row.equal:.4%}, others within {row.steps} steps"
        click.echo(
            f"{row.shape:6} {row.tool:5} {row.seconds:8.2f} {row.process_seconds:12.2f} {row.mb_per_second:7.0f} "
            f"{row.times_copy:7.2f} {row.peak_rss / 1e6:8.0f}  {agreement}"
        )


def measure(shape: str, place: Path, size: int, repeats: int, with_peft: bool) -> list[Row]:
    programs = {"copy": COPY, "ours": OURS} | ({"peft": PEFT} if with_peft else {})
    figures: dict[str, list[tuple[float, float, int]]] = {name: [] for name in programs}
    agreement: dict[str, Any] = {}
    names = list(programs)
    for turn in range(repeats):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            os.sync()
            figures[name].append(run(programs[name], place))
            if turn == 0 and name == "ours" and with_peft:
                keep_changed(place / "out", place / "changed")
            if turn == 0 and name == "peft":
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as comparer:
                    agreement = comparer.submit(compare, place / "out", place / "changed").result()
            shutil.rmtree(place / "out")
    rows = []
    copy = statistics.median(seconds for seconds, _, _ in figures["copy"])
    for name, runs in figures.items():
        inner, outer, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        agreed = agreement if name == "peft" else {}
        rows.append(Row(shape, name, inner, outer, size / inner / 1e6, copy / inner, round(peak), **agreed))
    return rows


def keep_changed(out: Path, kept: Path) -> None:
    """Keep the shards whose tensors an adapter changed, which are all; a hard link costs nothing."""
    kept.mkdir()
    for file in out.glob("*.safetensors"):
        os.link(file, kept / file.name)


def compare(out: Path, ours: Path) -> dict[str, Any]:
    """How many of the changed weights are equal, and the largest difference in steps of bfloat16."""
    import torch
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in ours.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            places |= {name: file for name in shard.keys() if name.endswith(TOUCHED)}  # noqa: SIM118 - not a mapping
    equal, count, steps = 0, 0, 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as theirs:
            for name in set(theirs.keys()) & set(places):
                with safe_open(places[name], framework="pt") as mine:
                    # The bit patterns of one sign are in the order of their values.
                    a, b = (
                        tensor.view(torch.int16).int() for tensor in (theirs.get_tensor(name), mine.get_tensor(name))
                    )
                apart = torch.where(a.sign() == b.sign(), (a - b).abs(), 0)
                equal, count, steps = equal + int((a == b).sum()), count + a.numel(), max(steps, int(apart.max()))
    return {"equal": equal / count, "steps": steps}


def run(program: str, place: Path) -> tuple[float, float, int]:
    """Seconds that the program says, seconds of the process, and its peak memory in bytes."""
    inputs = [str(place / name) for name in ("base", "out", "lora.pth", "peft")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *inputs], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said, complaint = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        raise click.ClickException(complaint.decode()[-2000:])
    # Linux counts kilobytes, macOS bytes.
    return float(json.loads(said)["seconds"]), seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    bench()
