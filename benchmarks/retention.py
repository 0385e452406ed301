"""How much of an adapter a merge keeps, by the size of the adapter, the stored type and the rounding.

Real merges of a random bfloat16 base (one layer of Qwen2.5-0.5B's width) with a rank-8 adapter on q and o, scaled so
that rms(delta) / rms(W) is the ratio of the row. Prints the table of docs/merging.md: retention, <W' - W, D> / <D, D>,
and in brackets the error that rounding left, rms(W' - W - D) / rms(D).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from random_bases import SHAPES, write_config
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.families import expected_tensors

RATIOS = (3e-4, 1e-3, 3e-3, 1e-2)
RANK = 8
CHOICES = {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
}
Factors = dict[str, torch.Tensor]


@click.command()
def bench() -> None:
    """Print the table in Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        click.echo("\n".join(table(Path(directory))))


def table(place: Path) -> Iterator[str]:
    base = place / "base"
    base.mkdir()
    sizes = write_config(base, SHAPES["0.5b"] | {"num_hidden_layers": 1, "vocab_size": 1000})
    draw = torch.Generator().manual_seed(0)
    weights = {
        n: (torch.randn(shape, generator=draw) * 0.02).bfloat16() for n, shape in expected_tensors(sizes).items()
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    yield f"| rms(delta)/rms(W) | {' | '.join(CHOICES)} |"
    yield "|---" * (len(CHOICES) + 1) + "|"
    for ratio in RATIOS:
        adapter = adapter_of(weights, ratio, draw)
        torch.save(adapter, place / "lora.pth")
        cells = [figures(base, place, adapter, flags) for flags in CHOICES.values()]
        yield f"| {ratio:.0e} | {' | '.join(cells)} |"


def adapter_of(weights: Factors, ratio: float, draw: torch.Generator) -> Factors:
    """The trainer's file, every change of the wanted size."""
    adapter: Factors = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            rows, columns = weight.shape
            a, b = torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)
            size = ratio * weight.float().square().mean().sqrt() / (b @ a).square().mean().sqrt()
            module = name.removesuffix(".weight")
            adapter |= {f"{module}.lora.A.weight": a, f"{module}.lora.B.weight": b * size}
    return adapter


def figures(base: Path, place: Path, adapter: Factors, flags: dict[str, str]) -> str:
    report = exporter.merge(base, place / "lora.pth", place / "out", force=True, **flags)  # type: ignore[arg-type]
    assert report.totals is not None
    before, after = load_file(base / "model.safetensors"), load_file(place / "out" / "model.safetensors")
    noise, size = 0.0, 0.0
    for module in {name.split(".lora.")[0] for name in adapter}:
        delta = adapter[f"{module}.lora.B.weight"].double() @ adapter[f"{module}.lora.A.weight"].double()
        moved = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        noise += float((moved - delta).square().sum())
        size += float(delta.square().sum())
    return f"{report.totals.retention:.0%} ({(noise / size) ** 0.5:.2g})"


if __name__ == "__main__":
    bench()
