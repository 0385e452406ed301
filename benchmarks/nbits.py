"""What 4 and 8 bits a weight cost, by block and by the way in which they are chosen.

The demo adapter merged into SmolLM2-135M-Instruct, in float32; every linear weight and the tied embedding are replaced
by what their quantised form stands for, so that nothing but the weights differs. ``calibrated`` rows are read from what
``export`` writes, the others round every value for itself. ``auto`` spends a share of the bytes between all layers at
4 bits and all at 8. The text is the documentation of this package and the demo data's
conversations, in sequences of 512 tokens, of which every position is predicted.

Prints a table in Markdown; some twenty minutes of processor time.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from onnx import numpy_helper
from torch.nn.functional import pad

from pos2d import exporter, runtime
from pos2d.exporter.formats.onnx.format import plan_onnx
from pos2d.exporter.formats.onnx.weight_layout import DATA_FILE, SIDE_BY_SIDE, embedding_block
from pos2d.exporter.formats.wanted import Wanted
from pos2d.exporter.quantisation.blockwise import SEARCHED, dequantise, quantise
from pos2d.exporter.sources.source import from_merged
from pos2d.graph_recipe import BITS, DEFAULT_BLOCKS, GraphQuant

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "examples" / "demo_adapter" / "lora.pth"
LENGTH = 512
BATCH = 4
HEAD = "model.embed_tokens.weight"
COLUMNS = ("bits", "block", "scales", "head", "bits a weight", "MB", "noise", "KL", "top-1")

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]
Scheme = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Cost:
    """Against the unquantised model: mean KL(reference || quantised) in nats, and equal first choices."""

    kl: float
    top1: float


class Study:
    """A float32 model whose weights can be replaced, and what it says of a text with its own."""

    def __init__(self, artifact: Path, sequences: int) -> None:
        loaded = runtime.load(artifact, device="cpu", dtype="float32")
        self.model: Any = loaded.backend._model  # type: ignore[attr-defined]
        self.ids = text_of(loaded.tokenizer)[:sequences]
        # Inputs in place of the tokens' ids, for who looks at a part of the model.
        self.given: dict[str, Tensor] | None = None
        layers = {n: p for n, p in self.model.model.named_parameters(prefix="model") if p.ndim == 2}
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in layers.items()}
        self._places = layers
        self._reference = [logits.log_softmax(-1) for logits in self.read()]

    @torch.inference_mode()
    def read(self, count: int | None = None) -> Iterator[Tensor]:
        """Logits ``[positions, V]`` of a few sequences at a time."""
        for ids in torch.split(self.ids[:count], BATCH):
            times = torch.arange(LENGTH).expand(len(ids), -1)
            mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
            pairs = torch.stack([torch.zeros_like(times), times], dim=-1)
            inputs = self.given or {"input_ids": ids}
            yield self.model(
                **inputs, position_ids=times, pos2d=pairs, attention_mask=mask, use_cache=False
            ).logits.flatten(0, 1)

    @torch.inference_mode()
    def cost(self, changed: Tensors, count: int | None = None) -> Cost:
        """Of ``changed`` weights in place of the model's own, over the first ``count`` sequences."""
        for name, weight in changed.items():
            self._places[name].copy_(weight)
        divergence, same, positions = 0.0, 0, 0
        for logits, expected in zip(self.read(count), self._reference, strict=False):
            expected = expected[: len(logits)]
            for found, wanted in zip(torch.split(logits, LENGTH), torch.split(expected, LENGTH), strict=True):
                found = found.log_softmax(-1)
                divergence += float((wanted.exp() * (wanted - found)).sum())
                same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
            positions += len(logits)
        for name in changed:
            self._places[name].copy_(self.weights[name])
        return Cost(divergence / positions, same / positions)


def text_of(tokenizer: Any) -> Tensor:
    """Token ids ``[sequences, 512]``: documentation and conversations by turns."""
    pages = "\n\n".join(
        p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    lines = [
        json.loads(line) for line in (ROOT / "examples/demo_data/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    turns = [[{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}] for row in lines]
    talk = "".join(tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns[:200])
    pieces = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in (pages, talk)]
    halves = [ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH) for ids in pieces]
    shortest = min(map(len, halves))
    return torch.stack([half[:shortest] for half in halves], dim=1).flatten(0, 1)


def nearest(values: Tensor, bits: int, block: int) -> Tensor:
    """The largest magnitude of a block at the end of the steps, the rest rounded."""
    return dequantise(*quantise(values, bits, block, steps=(2.0 ** (bits - 1),)), bits, values.shape[1])


def searched(values: Tensor, bits: int, block: int) -> Tensor:
    """The scale with the least squared error of a few."""
    return dequantise(*quantise(values, bits, block, SEARCHED[bits]), bits, values.shape[1])


def in_pieces(scheme: Callable[[Tensor, int], Tensor], values: Tensor, bits: int, block: int) -> Tensor:
    """A scheme for blocks ``[n, block]``, over a matrix."""
    whole = pad(values, (0, -values.shape[1] % block))
    done = [scheme(blocks, bits) for blocks in torch.split(whole.reshape(-1, block), (1 << 18) // block)]
    return torch.cat(done).reshape(whole.shape)[:, : values.shape[1]]


def k_quant(blocks: Tensor, bits: int) -> Tensor:
    """Scale and minimum as llama.cpp's and ONNX Runtime's k-quants choose them, the minimum as whole steps."""
    top = 2**bits - 1
    weights = blocks.square().mean(1, keepdim=True).sqrt() + blocks.abs()
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    span = (high - low).clamp_min(1e-30)
    scale, start = span / top, low
    q = ((blocks - low) / scale).round()
    least = (weights * (scale * q + start - blocks).square()).sum(1, keepdim=True)
    sum_w, sum_x = weights.sum(1, keepdim=True), (weights * blocks).sum(1, keepdim=True)
    for step in range(20):
        q = ((blocks - low) * ((top - 1 + 0.1 * step) / span)).round().clamp(0, top)
        wq = weights * q
        sum_l, sum_l2 = wq.sum(1, keepdim=True), (wq * q).sum(1, keepdim=True)
        sum_xl = (wq * blocks).sum(1, keepdim=True)
        below = (sum_w * sum_l2 - sum_l * sum_l).clamp_min(1e-30)
        new, base = (sum_w * sum_xl - sum_x * sum_l) / below, (sum_l2 * sum_x - sum_l * sum_xl) / below
        error = (weights * (new * q + base - blocks).square()).sum(1, keepdim=True)
        better = (error < least) & (new > 0)
        least = torch.where(better, error, least)
        scale, start = torch.where(better, new, scale), torch.where(better, base, start)
    zero = (-start / scale).round().clamp(0, top)
    found: Tensor = ((blocks / scale + zero).round().clamp(0, top) - zero) * scale
    return found


def hqq(blocks: Tensor, bits: int) -> Tensor:
    """Half-quadratic: zero points for a robust norm of the error, then in whole steps."""
    top = 2**bits - 1
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = (high - low).clamp_min(1e-30) / top
    zero, beta = -low / scale, 10.0
    for _ in range(20):
        q = (blocks / scale + zero).round().clamp(0, top)
        error = blocks - (q - zero) * scale
        size = error.abs()
        error = error.sign() * (size - (size + 1e-8).pow(-0.3) / beta).relu()
        zero = (q - (blocks - error) / scale).mean(1, keepdim=True)
        beta *= 1.01
    zero = zero.round().clamp(0, top)
    found: Tensor = ((blocks / scale + zero).round().clamp(0, top) - zero) * scale
    return found


SCHEMES: dict[str, Scheme] = {
    "nearest": nearest,
    "searched": searched,
    "k-quant, zero points": partial(in_pieces, k_quant),
    "hqq, zero points": partial(in_pieces, hqq),
}
# Bits, block and scheme of the layers; bits of the head. Ours are "searched" for 8 bits, "nearest" for 4.
ROWS = (
    *((8, block, "searched", 8) for block in (16, 32, 64, 128)),
    *((4, 32, name, 8) for name in SCHEMES),
    (4, 32, "nearest", 4),
    *((4, block, "nearest", 8) for block in (64, 128)),
)
# What is exported, calibrated.
EXPORTED: tuple[tuple[GraphQuant, int], ...] = (
    ("int8", 16),
    ("int8", 32),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
)
# Of the bytes between all layers at 4 bits and all at 8.
SHARES = (0.25, 0.5)


def bits_of(bits: int, block: int, scheme: str) -> float:
    """A weight's share of its block: values, float32 scale, and a zero point of as many bits as a value."""
    return bits + (32 + bits * scheme.endswith("zero points")) / block


@click.command()
@click.option("--base-model", type=click.Path(path_type=Path, exists=True), default=ROOT / "demo" / "base")
@click.option("--merged", type=click.Path(path_type=Path, exists=True), help="In place of merging first.")
@click.option("--sequences", default=20, show_default=True, help="Of 512 tokens.")
def bench(base_model: Path, merged: Path | None, sequences: int) -> None:
    """Print the table in Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        if merged is None:
            merged = Path(directory) / "merged"
            exporter.merge(base_model, ADAPTER, merged, dtype="float32", rope_2d_ratio=1.0)
        study = Study(merged, sequences)
        click.echo(f"{study.ids.numel()} positions\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for row in ROWS:
            click.echo(f"| {' | '.join(row_of(study, *row))} |")
        for quant, block in EXPORTED:
            click.echo(f"| {' | '.join(exported_row(study, merged, quant, block))} |")
        for share in SHARES:
            click.echo(f"| {' | '.join(exported_row(study, merged, 'auto', DEFAULT_BLOCKS['auto'], share))} |")


def size_between(merged: Path, block: int, share: float) -> str:
    """Bytes of a share of the way from all layers at 4 bits to all at 8."""
    few, many = (
        plan_onnx(from_merged(merged), Wanted("onnx", quant, block, None, "", None, "auto", None, True)).nbytes
        for quant in ("int4", "int8")
    )
    return str(int(few + share * (many - few)))


def row_of(study: Study, bits: int, block: int, scheme: str, head_bits: int) -> tuple[str, ...]:
    changed = {n: SCHEMES[scheme](w, bits, block) for n, w in study.weights.items() if n != HEAD}
    head_block = min(block, embedding_block(study.weights[HEAD].shape[1]))
    changed[HEAD] = (nearest if head_bits == 4 else searched)(study.weights[HEAD], head_bits, head_block)
    sizes = {n: w.numel() for n, w in study.weights.items()}
    head = bits_of(head_bits, head_block, "")
    total = sum(s * (head if n == HEAD else bits_of(bits, block, scheme)) for n, s in sizes.items())
    return (str(bits), str(block), scheme, str(head_bits), *cells_of(study, changed, total / sum(sizes.values())))


def exported_row(
    study: Study, merged: Path, quant: GraphQuant, block: int, share: float | None = None
) -> tuple[str, ...]:
    size = None if share is None else size_between(merged, block, share)
    with tempfile.TemporaryDirectory() as directory:
        exporter.export(
            merged, Path(directory) / "graph", quant=quant, block_size=block, target_size=size, no_verify=True
        )
        changed = weights_of(Path(directory) / "graph", study)
        nbytes = (Path(directory) / "graph" / DATA_FILE).stat().st_size
    bits = str(BITS[quant]) if share is None else f"auto, {share:.0%}"
    mean = 8 * nbytes / sum(w.numel() for w in study.weights.values())
    return (bits, str(block), "calibrated", "8", *cells_of(study, changed, mean))


def weights_of(graph: Path, study: Study) -> dict[str, Tensor]:
    """What the products of an exported graph multiply with, by the names of the model's own weights."""
    model = onnx.load(graph / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found: dict[str, Tensor] = {}
    for node in (node for node in model.graph.node if node.op_type == "MatMulNBits"):
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        packed, scales = (torch.from_numpy(stored[name].copy()) for name in node.input[1:3])
        values = dequantise(packed, scales, facts["bits"], facts["K"])
        block = node.input[1].rpartition(".")[0].rpartition(".")[0]
        names = [node.input[1]]
        if names[0] not in study.weights and block:
            names = [f"{block}.{module}.weight" for module in SIDE_BY_SIDE[block.rpartition(".")[2]]]
        names = [name if name in study.weights else HEAD for name in names]
        found |= zip(names, torch.split(values, [len(study.weights[name]) for name in names]), strict=True)
    return found


def cells_of(study: Study, changed: Tensors, mean_bits: float) -> tuple[str, ...]:
    noises = [relative_noise(study.weights[n], w) ** 2 for n, w in changed.items() if n != HEAD]
    cost = study.cost(changed)
    size = mean_bits * sum(w.numel() for w in study.weights.values()) / 8
    noise = math.sqrt(sum(noises) / len(noises))
    return f"{mean_bits:.2f}", f"{size / 1e6:.1f}", f"{noise:.2%}", f"{cost.kl:.2e}", f"{cost.top1:.1%}"


def relative_noise(weight: Tensor, stored: Tensor) -> float:
    return math.sqrt(float((stored - weight).square().sum() / weight.square().sum()))


if __name__ == "__main__":
    bench()
