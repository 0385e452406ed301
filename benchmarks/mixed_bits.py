"""Which layers are worth 8 bits where the others have 4: scores of layers, and what choices by them come to.

The model and text of nbits.py. Half of the bytes between all layers at 4 bits and all at 8 go to the layers with the
highest score a byte; the embedding has 8 bits throughout. The best that can be expected is a choice by what 4 bits of
a layer alone do to the text itself, ``its own KL``.

Prints two tables in Markdown; some twenty minutes of processor time.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from nbits import ADAPTER, HEAD, LENGTH, ROOT, Study, Tensors, nearest, searched
from safetensors.torch import load_file
from torch import nn

from pos2d import exporter
from pos2d.exporter.quantisation.allocation import units_of

BLOCK = 32
SCHEMES = {4: nearest, 8: searched}
PROBES = 2
Scores = dict[str, float]


@click.command()
@click.option("--base-model", type=click.Path(path_type=Path, exists=True), default=ROOT / "demo" / "base")
@click.option("--merged", type=click.Path(path_type=Path, exists=True), help="In place of merging first.")
@click.option("--sequences", default=20, show_default=True, help="Of 512 tokens.")
@click.option("--share", default=0.5, show_default=True, help="Of the weights of layers, to have 8 bits.")
def bench(base_model: Path, merged: Path | None, sequences: int, share: float) -> None:
    """Print the tables in Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        if merged is None:
            merged = Path(directory) / "merged"
            exporter.merge(base_model, ADAPTER, merged, dtype="float32", rope_2d_ratio=1.0)
        study = Study(merged, sequences)
    few, many = ({n: scheme(w, bits, BLOCK) for n, w in study.weights.items()} for bits, scheme in SCHEMES.items())
    few[HEAD] = many[HEAD]
    alone = kl_of_each(study, few)
    click.echo("| module | 4 bits alone: sum of KL | KL per million weights |\n|---|---|---|")
    for kind in sorted({n.split(".")[-2] for n in alone}):
        names = [n for n in alone if n.split(".")[-2] == kind]
        total, size = sum(alone[n] for n in names), sum(study.weights[n].numel() for n in names)
        click.echo(f"| {kind} | {total:.1e} | {total / size * 1e6:.1e} |")
    worst = sorted(alone, key=lambda n: -alone[n])[:12]
    click.echo("\nmost: " + ", ".join(f"{n.removesuffix('.weight')} {alone[n]:.1e}" for n in worst) + "\n")
    click.echo("| 8 bits for | KL | top-1 |\n|---|---|---|")
    for name, changed in (("none", few), ("all", many)):
        cost = study.cost(changed)
        click.echo(f"| {name} | {cost.kl:.2e} | {cost.top1:.1%} |")
    for name, scores in scores_of(study, base_model, few, alone):
        cost = study.cost(few | {n: many[n] for n in chosen(study, scores, share)})
        click.echo(f"| {name} | {cost.kl:.2e} | {cost.top1:.1%} |")


def chosen(study: Study, scores: Scores, share: float) -> Iterator[str]:
    """The layers of the highest score a weight that fit."""
    sizes = {n: study.weights[n].numel() for n in scores}
    left = share * sum(sizes.values())
    for name in sorted(scores, key=lambda n: -scores[n] / sizes[n]):
        if sizes[name] <= left:
            left -= sizes[name]
            yield name


def scores_of(study: Study, base_model: Path, few: Tensors, alone: Scores) -> Iterator[tuple[str, Scores]]:
    weights = {n: w for n, w in study.weights.items() if n != HEAD}
    errors = {n: few[n] - w for n, w in weights.items()}
    base = load_file(base_model / "model.safetensors")
    norms = {n: study.model.get_parameter(norm) for n in weights if (norm := norm_before(n)) is not None}
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(study.model.config.vocab_size, (4, LENGTH), generator=draws)
    yield "its own KL", alone
    yield "error", {n: power(e) for n, e in errors.items()}
    yield "error / weight", {n: power(e) / power(weights[n]) for n, e in errors.items()}
    by_delta = {n: power(e) / power(weights[n] - base[n].float()) for n, e in errors.items()}
    yield "error / delta", by_delta
    sizes = {n: w.numel() for n, w in weights.items()}
    # Ours: layers that read the same input have the same bits.
    yield "error / weight, together", together({n: power(e) / power(weights[n]) for n, e in errors.items()}, sizes)
    yield "error / delta, together", together(by_delta, sizes)
    yield "error, by norm weights", {n: power(e * norms[n]) if n in norms else power(e) for n, e in errors.items()}
    for name, ids in (("random tokens", noise), ("this text", study.ids[:4])):
        inputs = inputs_of(study, ids)
        yield f"output error, {name}", {n: power(e * inputs[n].sqrt()) for n, e in errors.items()}
        yield (
            f"output error / output, {name}",
            {n: power(e * inputs[n].sqrt()) / power(weights[n] * inputs[n].sqrt()) for n, e in errors.items()},
        )
    order = list(weights)
    yield "the first layers", {n: weights[n].numel() * (len(order) - i) for i, n in enumerate(order)}
    yield "the last layers", {n: weights[n].numel() * i for i, n in enumerate(order)}
    for seed in range(3):
        dice = torch.rand(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
        yield f"chance, {seed}", {n: weights[n].numel() * dice[i] for i, n in enumerate(order)}


def together(scores: Scores, sizes: Mapping[str, int]) -> Scores:
    """The same score a weight for all layers that read the same input."""
    found: Scores = {}
    for unit in units_of([name.removesuffix(".weight") for name in scores]):
        names = [f"{module}.weight" for module in unit]
        mean = sum(scores[n] for n in names) / sum(sizes[n] for n in names)
        found |= {n: mean * sizes[n] for n in names}
    return found


def power(values: torch.Tensor) -> float:
    return float(values.square().sum())


def norm_before(name: str) -> str | None:
    layer = name.rsplit(".", 3)[0]
    if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
        return f"{layer}.input_layernorm.weight"
    return f"{layer}.post_attention_layernorm.weight" if name.split(".")[-2] in ("gate_proj", "up_proj") else None


@torch.inference_mode()
def inputs_of(study: Study, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean square of every input of every layer."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: found.update({f"{name}.weight": given[0].square().flatten(0, -2).mean(0)})
        )
        for name, module in study.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    study.ids, kept = ids, study.ids
    list(study.read())
    study.ids = kept
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def kl_of_each(study: Study, few: Tensors) -> Scores:
    """What each layer costs alone, over a few sequences; what comes before it is computed once."""
    layers: Any = study.model.model.layers
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: states.append(given[0].clone())) for layer in layers]
    list(study.read(PROBES))
    for hook in hooks:
        hook.remove()
    found: Scores = {}
    for i in range(len(layers)):
        study.model.model.layers, study.given = layers[i:], {"inputs_embeds": states[i]}
        for name in few:
            if name.startswith(f"model.layers.{i}."):
                found[name] = study.cost({name: few[name]}, PROBES).kl
    study.model.model.layers, study.given = layers, None
    return found


if __name__ == "__main__":
    bench()
