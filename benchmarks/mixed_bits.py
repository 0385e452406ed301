"""Mixed precision: scores that rank layers for 8 bits instead of 4, and the quality of the models that they choose.

Model and text are those of nbits.py. Half of the bytes between all layers at 4 bits and all at 8 go to the layers with
the highest score for each byte; the embedding always has 8 bits. ``its own KL``, measured on the text itself with one
layer at a time in 4 bits, is the best score that can be expected.

Prints two tables in Markdown, and takes some twenty minutes of processor time.
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
from pos2d.exporter.quantisation.allocation import fusion_groups

BLOCK_SIZE = 32
METHODS = {4: nearest, 8: searched}
# Sequences on which single layers are measured.
PROBE_SEQUENCES = 2
Scores = dict[str, float]


@click.command()
@click.option("--base-model", type=click.Path(path_type=Path, exists=True), default=ROOT / "demo" / "base")
@click.option(
    "--merged", type=click.Path(path_type=Path, exists=True), help="A merged directory to use instead of merging first."
)
@click.option("--sequences", default=20, show_default=True, help="Number of sequences of 512 tokens.")
@click.option("--share", default=0.5, show_default=True, help="Share of the layers' weights that get 8 bits.")
def bench(base_model: Path, merged: Path | None, sequences: int, share: float) -> None:
    """Print the tables in Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        if merged is None:
            merged = Path(directory) / "merged"
            exporter.merge(base_model, ADAPTER, merged, dtype="float32", rope_2d_ratio=1.0)
        study = Study(merged, sequences)
    int4, int8 = (
        {n: method(w, bits, BLOCK_SIZE) for n, w in study.weights.items()} for bits, method in METHODS.items()
    )
    int4[HEAD] = int8[HEAD]
    alone = kl_of_each(study, int4)
    click.echo("| module | 4 bits alone: sum of KL | KL per million weights |\n|---|---|---|")
    for kind in sorted({n.split(".")[-2] for n in alone}):
        names = [n for n in alone if n.split(".")[-2] == kind]
        total, size = sum(alone[n] for n in names), sum(study.weights[n].numel() for n in names)
        click.echo(f"| {kind} | {total:.1e} | {total / size * 1e6:.1e} |")
    worst = sorted(alone, key=lambda n: -alone[n])[:12]
    click.echo("\nmost: " + ", ".join(f"{n.removesuffix('.weight')} {alone[n]:.1e}" for n in worst) + "\n")
    click.echo("| 8 bits for | KL | top-1 |\n|---|---|---|")
    for name, quantised in (("none", int4), ("all", int8)):
        cost = study.cost(quantised)
        click.echo(f"| {name} | {cost.kl:.2e} | {cost.top1:.1%} |")
    for name, scores in scores_of(study, base_model, int4, alone):
        cost = study.cost(int4 | {n: int8[n] for n in chosen(study, scores, share)})
        click.echo(f"| {name} | {cost.kl:.2e} | {cost.top1:.1%} |")


def chosen(study: Study, scores: Scores, share: float) -> Iterator[str]:
    """The layers with the highest score for each weight, as many as fit into ``share`` of all weights."""
    sizes = {n: study.weights[n].numel() for n in scores}
    budget = share * sum(sizes.values())
    for name in sorted(scores, key=lambda n: -scores[n] / sizes[n]):
        if sizes[name] <= budget:
            budget -= sizes[name]
            yield name


def scores_of(study: Study, base_model: Path, int4: Tensors, alone: Scores) -> Iterator[tuple[str, Scores]]:
    """Every score by its name; ``alone`` are those of :func:`kl_of_each`."""
    weights = {n: w for n, w in study.weights.items() if n != HEAD}
    errors = {n: int4[n] - w for n, w in weights.items()}
    base = load_file(base_model / "model.safetensors")
    norms = {n: study.model.get_parameter(norm) for n in weights if (norm := norm_before(n)) is not None}
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(study.model.config.vocab_size, (4, LENGTH), generator=generator)
    yield "its own KL", alone
    yield "error", {n: square_sum(e) for n, e in errors.items()}
    yield "error / weight", {n: square_sum(e) / square_sum(weights[n]) for n, e in errors.items()}
    by_delta = {n: square_sum(e) / square_sum(weights[n] - base[n].float()) for n, e in errors.items()}
    yield "error / delta", by_delta
    sizes = {n: w.numel() for n, w in weights.items()}
    # The score of exports, in which layers that read the same input have the same bits.
    yield (
        "error / weight, together",
        shared({n: square_sum(e) / square_sum(weights[n]) for n, e in errors.items()}, sizes),
    )
    yield "error / delta, together", shared(by_delta, sizes)
    yield (
        "error, by norm weights",
        {n: square_sum(e * norms[n]) if n in norms else square_sum(e) for n, e in errors.items()},
    )
    for name, ids in (("random tokens", random), ("this text", study.ids[:4])):
        input_squares = mean_square_inputs(study, ids)
        yield f"output error, {name}", {n: square_sum(e * input_squares[n].sqrt()) for n, e in errors.items()}
        yield (
            f"output error / output, {name}",
            {
                n: square_sum(e * input_squares[n].sqrt()) / square_sum(weights[n] * input_squares[n].sqrt())
                for n, e in errors.items()
            },
        )
    order = list(weights)
    yield "the first layers", {n: weights[n].numel() * (len(order) - i) for i, n in enumerate(order)}
    yield "the last layers", {n: weights[n].numel() * i for i, n in enumerate(order)}
    for seed in range(3):
        random_scores = torch.rand(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
        yield f"chance, {seed}", {n: weights[n].numel() * random_scores[i] for i, n in enumerate(order)}


def shared(scores: Scores, sizes: Mapping[str, int]) -> Scores:
    """``scores`` with their mean for each weight over all layers that read the same input."""
    means: Scores = {}
    for group in fusion_groups([name.removesuffix(".weight") for name in scores]):
        names = [f"{module}.weight" for module in group]
        mean = sum(scores[n] for n in names) / sum(sizes[n] for n in names)
        means |= {n: mean * sizes[n] for n in names}
    return means


def square_sum(values: torch.Tensor) -> float:
    return float(values.square().sum())


def norm_before(name: str) -> str | None:
    """The norm weight that scales the inputs of a layer, or None."""
    layer = name.rsplit(".", 3)[0]
    if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
        return f"{layer}.input_layernorm.weight"
    return f"{layer}.post_attention_layernorm.weight" if name.split(".")[-2] in ("gate_proj", "up_proj") else None


@torch.inference_mode()
def mean_square_inputs(study: Study, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean square of each input of every linear layer, ``[in]`` by the weight's name, over token ids ``ids``."""
    mean_squares: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: mean_squares.update({f"{name}.weight": args[0].square().flatten(0, -2).mean(0)})
        )
        for name, module in study.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    study.ids, text_ids = ids, study.ids
    list(study.logits())
    study.ids = text_ids
    for hook in hooks:
        hook.remove()
    return mean_squares


@torch.inference_mode()
def kl_of_each(study: Study, int4: Tensors) -> Scores:
    """The KL of each layer alone in 4 bits, over a few sequences; the decoder layers before it run once for all."""
    layers: Any = study.model.model.layers
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0].clone())) for layer in layers]
    list(study.logits(PROBE_SEQUENCES))
    for hook in hooks:
        hook.remove()
    scores: Scores = {}
    for i in range(len(layers)):
        study.model.model.layers, study.model_inputs = layers[i:], {"inputs_embeds": states[i]}
        for name in int4:
            if name.startswith(f"model.layers.{i}."):
                scores[name] = study.cost({name: int4[name]}, PROBE_SEQUENCES).kl
    study.model.model.layers, study.model_inputs = layers, None
    return scores


if __name__ == "__main__":
    bench()
