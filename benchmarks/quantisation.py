"""The quality of bitsandbytes artifacts on a real text, quantised from the exact sum or from a bfloat16 merge.

The model is SmolLM2-135M-Instruct, rounded to bfloat16 as models are published, with its demo adapter. For a smaller
adapter, a part of the demo adapter is added to the base first and only the remainder is merged: the resulting model is
about the same, and only the size of the change differs. Each artifact is compared with the float32 merge and computes
in float32, so that nothing but the weights differs; the last two rows compute in bfloat16 with either int8 kernel. The
text is the held-out questions, and their answers are predicted.

Prints the tables of docs/quantisation.md, and takes ten minutes of processor time.
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
from pos2d.bnb_format import BnbQuant
from pos2d.runtime.evaluate import CaseFigures

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "examples" / "demo_adapter" / "lora.pth"
TEXT = ROOT / "examples" / "demo_data" / "held_out.jsonl"
# The parts of the adapter that are merged last.
WEIGHTS = (0.02, 0.1, 1.0)
POSITIONS: dict[str, Any] = {"rope_2d_ratio": 1.0}
COLUMNS = (
    "rms(delta)/rms(W)",
    "weights",
    "quantised from",
    "kept",
    "perplexity (float32)",
    "nll change",
    "KL",
    "top-1",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of storing the same sum; ``retention`` is the share of the adapter that merge or export report."""

    weights: str
    source: str
    retention: float | None
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
        click.echo(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for row in rows:
            click.echo(f"| {' | '.join((*row.names, *figures(row.cases[n])))} |")
        click.echo()


def measured(base_model: Path, directory: Path) -> Iterator[Row]:
    """The rows of the tables, one by one."""
    published = copy_of_base(base_model, directory / "published", None)
    for weight in WEIGHTS:
        base = published
        if weight != 1.0:
            exporter.merge(published, f"{ADAPTER}={1 - weight}", directory / "first", dtype="bfloat16", **POSITIONS)
            base = copy_of_base(published, directory / "base", directory / "first")
        reference, size, variants = variants_of(base, weight, directory / "artifacts")
        for variant in variants:
            yield row_of(f"{size:.1e}", variant, reference, dtype="float32")
        for kernel in ("weight-only", "bnb") if weight == 1.0 else ():
            variant = replace(variants[1], weights=f"8bit, {kernel} in bfloat16")
            yield row_of(f"{size:.1e}", variant, reference, dtype="bfloat16", int8_kernel=kernel)
        for path in (directory / "first", directory / "base", directory / "artifacts"):
            shutil.rmtree(path, ignore_errors=True)


def copy_of_base(base: Path, target: Path, weights: Path | None) -> Path:
    """Copy ``base`` in bfloat16, with the weights of the merge ``weights`` in place of its own if there is one."""
    shutil.copytree(base, target)
    tensors = load_file((weights or base) / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}), encoding="utf-8")
    return target


def variants_of(base: Path, weight: float, directory: Path) -> tuple[Path, float, list[Variant]]:
    """The float32 merge, rms(delta) / rms(W), and the variants to compare with that merge."""
    lora, exact, rounded = f"{ADAPTER}={weight}", directory / "float32", directory / "bfloat16"
    directory.mkdir()
    exact_figures = exporter.merge(base, lora, exact, dtype="float32", **POSITIONS).totals
    rounded_figures = exporter.merge(base, lora, rounded, dtype="bfloat16", **POSITIONS).totals
    assert exact_figures is not None
    assert rounded_figures is not None
    assert exact_figures.delta_ratio is not None
    variants = [Variant("bfloat16", "", rounded_figures.retention, rounded)]
    for quant in get_args(BnbQuant):
        from_sum, from_merge = directory / f"{quant} from the sum", directory / f"{quant} from the merge"
        source: dict[str, Any] = {"base_model": base, "lora": lora, **POSITIONS}
        report = exporter.export(None, from_sum, format="bnb", quant=quant, dtype="float32", **source)
        assert report.quantised is not None
        variants.append(Variant(quant, "exact sum", report.quantised.retention, from_sum))
        exporter.export(rounded, from_merge, format="bnb", quant=quant, dtype="float32")
        variants.append(Variant(quant, "bfloat16 merge", rounded_figures.retention, from_merge))
    return exact, exact_figures.delta_ratio, variants


def row_of(size: str, variant: Variant, reference: Path, **loading: Any) -> Row:
    report = runtime.evaluate(variant.path, TEXT, against=reference, **loading)
    return Row((size, variant.weights, variant.source, f"{variant.retention:.1%}"), report.cases)


def figures(case: CaseFigures) -> tuple[str, str, str, str]:
    return (
        f"{case.perplexity:.3f} ({case.reference_perplexity:.3f})",
        f"{case.nll_change:+.4f} ± {case.nll_change_error:.4f}",
        f"{case.mean_kl:.1e}",
        f"{case.top1_agreement:.1%}",
    )


if __name__ == "__main__":
    bench()
