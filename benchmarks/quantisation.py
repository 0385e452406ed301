"""What quantising costs on a real text, and what it costs to quantise a file that was rounded before.

SmolLM2-135M-Instruct, rounded to bfloat16 as models are published, and its demo adapter. An adapter of another size is
the last part of that one: the first part is added to the base, so that every group of rows is about the same working
model and only what is left to add differs in size. Each is quantised from the exact sum and from its bfloat16 merge,
and held against its float32 merge, computing in float32, so that nothing but the weights differs; the last two rows
compute in bfloat16 with either int8 kernel. The text is the held-out questions; their answers are predicted.

Prints the tables of docs/quantisation.md; ten minutes of processor time.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import click
from safetensors.torch import load_file, save_file

from pos2d import exporter, runtime
from pos2d.recipe import Quant
from pos2d.runtime.evaluate import CaseFigures

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "examples" / "demo_adapter" / "lora.pth"
TEXT = ROOT / "examples" / "demo_data" / "held_out.jsonl"
WEIGHTS = (0.02, 0.1, 1.0)
POSITIONS: dict[str, Any] = {"rope_2d_ratio": 1.0}
HEADS = ("rms(delta)/rms(W)", "weights", "quantised from", "kept", "perplexity (float32)", "nll change", "KL", "top-1")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of storing the same sum; ``kept`` is the share of the adapter that merge or export say it has."""

    weights: str
    source: str
    kept: float | None
    path: Path


@dataclass(frozen=True, slots=True)
class Row:
    names: tuple[str, str, str, str]
    cases: tuple[CaseFigures, ...]


@click.command()
@click.option("--base-model", type=click.Path(path_type=Path, exists=True), default=ROOT / "demo" / "base")
def bench(base_model: Path) -> None:
    """Print the tables in Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        rows = list(measured(base_model, Path(directory)))
    for n, case in enumerate(rows[0].cases):
        click.echo(f"{case.name}, {case.tokens} tokens predicted of {case.tokens_read}:\n")
        click.echo(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
        for row in rows:
            click.echo(f"| {' | '.join((*row.names, *figures(row.cases[n])))} |")
        click.echo()


def measured(base_model: Path, place: Path) -> Iterator[Row]:
    """Every row of the tables, as it is done."""
    published = copy_of_base(base_model, place / "published", None)
    for weight in WEIGHTS:
        base = published
        if weight != 1.0:
            exporter.merge(published, f"{ADAPTER}={1 - weight}", place / "first", dtype="bfloat16", **POSITIONS)
            base = copy_of_base(published, place / "base", place / "first")
        reference, size, variants = variants_of(base, weight, place / "artifacts")
        for variant in variants:
            yield row_of(f"{size:.1e}", variant, reference, dtype="float32")
        for kernel in ("weight-only", "bnb") if weight == 1.0 else ():
            variant = replace(variants[1], weights=f"8bit, {kernel} in bfloat16")
            yield row_of(f"{size:.1e}", variant, reference, dtype="bfloat16", int8_kernel=kernel)
        for path in (place / "first", place / "base", place / "artifacts"):
            shutil.rmtree(path, ignore_errors=True)


def copy_of_base(base: Path, target: Path, weights: Path | None) -> Path:
    """``base`` in bfloat16, with the weights of a merge of it in place of its own."""
    shutil.copytree(base, target)
    tensors = load_file((weights or base) / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}), encoding="utf-8")
    return target


def variants_of(base: Path, weight: float, place: Path) -> tuple[Path, float, list[Variant]]:
    """The float32 merge, rms(delta) / rms(W), and everything that is held against the merge."""
    lora, exact, rounded = f"{ADAPTER}={weight}", place / "float32", place / "bfloat16"
    place.mkdir()
    best = exporter.merge(base, lora, exact, dtype="float32", **POSITIONS).totals
    worse = exporter.merge(base, lora, rounded, dtype="bfloat16", **POSITIONS).totals
    assert best is not None
    assert worse is not None
    assert best.delta_ratio is not None
    variants = [Variant("bfloat16", "", worse.retention, rounded)]
    for quant in get_args(Quant):
        sum_path, file_path = place / f"{quant} of the sum", place / f"{quant} of the file"
        source: dict[str, Any] = {"base_model": base, "lora": lora, **POSITIONS}
        report = exporter.export(None, sum_path, format="bnb", quant=quant, dtype="float32", **source)
        assert report.quantised is not None
        variants.append(Variant(quant, "exact sum", report.quantised.retention, sum_path))
        exporter.export(rounded, file_path, format="bnb", quant=quant, dtype="float32")
        variants.append(Variant(quant, "bfloat16 merge", worse.retention, file_path))
    return exact, best.delta_ratio, variants


def row_of(size: str, variant: Variant, reference: Path, **loading: Any) -> Row:
    report = runtime.evaluate(variant.path, TEXT, against=reference, **loading)
    return Row((size, variant.weights, variant.source, f"{variant.kept:.1%}"), report.cases)


def figures(case: CaseFigures) -> tuple[str, str, str, str]:
    return (
        f"{case.perplexity:.3f} ({case.reference_perplexity:.3f})",
        f"{case.nll_change:+.4f} ± {case.nll_change_error:.4f}",
        f"{case.mean_kl:.1e}",
        f"{case.top1_agreement:.1%}",
    )


if __name__ == "__main__":
    bench()
