"""Peak memory as ``exporter/planning/footprint.py`` estimates it, and as fresh processes were measured on the CPU.

Every run loads an artifact and answers random token ids in a process of its own, which reports its largest resident
set; medians are taken. No tokenizer is loaded. A further artifact is one more line in ``ARTIFACTS`` and its cases.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from pos2d.exporter.planning.footprint import Format, Workload, cpu_memory

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import json, resource, sys
import numpy as np
from pos2d import runtime
path, branches, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
model = runtime.load(path, device="cpu")
prompts = np.random.default_rng(0).integers(0, model.manifest.vocab_size, (branches, prompt)).tolist()
model.generate_ids(prompts, max_new_tokens=new, ignore_eos=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(peak * (1 if sys.platform == "darwin" else 1024)))  # Linux counts kilobytes, macOS bytes
"""
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Case:
    """``context`` positions of all branches together, ``NEW_TOKENS`` of each branch among them."""

    artifact: str
    branches: int
    context: int

    @property
    def prompt_tokens(self) -> int:
        """Of each branch."""
        return self.context // self.branches - NEW_TOKENS


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes; ``measured`` are all runs, ``ratio`` the estimate to their median."""

    artifact: str
    branches: int
    context: int
    estimate: int
    measured: tuple[int, ...]
    ratio: float


def make_random(place: Path) -> None:
    from random_bases import SHAPES, make_inputs

    from pos2d import exporter

    make_inputs(place, SHAPES["0.5b"])
    exporter.merge(place / "base", place / "lora.pth", place / "artifact")


def make_demo(place: Path) -> None:
    from pos2d import exporter

    lora = ROOT / "examples" / "demo_adapter" / "lora.pth"
    exporter.merge(ROOT / "demo" / "base", lora, place / "artifact", rope_2d_ratio=1.0)


def make_export(place: Path, make: Callable[[Path], None] = make_demo, **flags: Any) -> None:
    """A model in another format."""
    from pos2d import exporter

    (place / "merged").mkdir()
    make(place / "merged")
    exporter.export(place / "merged" / "artifact", place / "artifact", no_verify=flags.get("format") != "bnb", **flags)


ARTIFACTS: dict[str, tuple[Format, Callable[[Path], None]]] = {
    "merged bfloat16, 0.5b": (Format("merged", "bfloat16"), make_random),
    "merged float32, demo": (Format("merged", "float32"), make_demo),
    "onnx float32, demo": (Format("onnx", "float32"), make_export),
    "onnx int8, demo": (Format("onnx", "float32", "int8"), partial(make_export, quant="int8")),
    "onnx int4, demo": (Format("onnx", "float32", "int4"), partial(make_export, quant="int4")),
    "onnx int8, 0.5b": (Format("onnx", "float32", "int8"), partial(make_export, make=make_random, quant="int8")),
    "onnx int4, 0.5b": (Format("onnx", "float32", "int4"), partial(make_export, make=make_random, quant="int4")),
    "bnb 8bit, demo": (
        Format("bnb", "bfloat16", "8bit"),
        partial(make_export, format="bnb", quant="8bit", dtype="bfloat16"),
    ),
    "bnb nf4, demo": (
        Format("bnb", "bfloat16", "nf4"),
        partial(make_export, format="bnb", quant="nf4", dtype="bfloat16"),
    ),
}


CASES = [
    Case(artifact, branches, context) for artifact in ARTIFACTS for branches, context in ((1, 64), (4, 1024), (1, 2048))
]


@click.command()
@click.option("-a", "--artifact", type=click.Choice(list(ARTIFACTS)), multiple=True, default=tuple(ARTIFACTS))
@click.option("-r", "--repeats", type=int, default=3, show_default=True)
@click.option("--directory", type=click.Path(path_type=Path), help="Where to work; 3 GB.")
@click.option("--json", "as_json", is_flag=True)
def bench(artifact: tuple[str, ...], repeats: int, directory: Path | None, as_json: bool) -> None:
    """Make the artifacts one after the other, run their cases, print a row for each."""
    rows: list[Row] = []
    for name in artifact:
        with tempfile.TemporaryDirectory(dir=directory) as place:
            # In a process of its own: a child starts with the peak memory of its parent.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
                maker.submit(ARTIFACTS[name][1], Path(place)).result()
            rows += [measure(case, Path(place) / "artifact", repeats) for case in CASES if case.artifact == name]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    click.echo(f"{'artifact':22} {'branches':>8} {'context':>7} {'estimate MB':>11} {'measured MB':>11} {'ratio':>6}")
    for row in rows:
        measured = statistics.median(row.measured) / 1e6
        click.echo(
            f"{row.artifact:22} {row.branches:8} {row.context:7} {row.estimate / 1e6:11.0f} {measured:11.0f} "
            f"{row.ratio:6.3f}"
        )


def measure(case: Case, path: Path, repeats: int) -> Row:
    from pos2d.exporter.planning.candidates import artifact_sizes

    sizes, _ = artifact_sizes(path)
    form, work = ARTIFACTS[case.artifact][0], Workload.of(case.branches, case.context)
    estimate = cpu_memory(sizes, form, work, tokenizer=False).peak
    peaks = tuple(run(case, path) for _ in range(repeats))
    ratio = estimate / statistics.median(peaks)
    return Row(case.artifact, case.branches, case.context, estimate, peaks, ratio)


def run(case: Case, path: Path) -> int:
    """Largest resident set of one run, in bytes."""
    figures = [str(number) for number in (case.branches, case.prompt_tokens, NEW_TOKENS)]
    command = [sys.executable, "-c", CHILD, str(path), *figures]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(done.stderr[-2000:])
    return int(done.stdout)


if __name__ == "__main__":
    bench()
