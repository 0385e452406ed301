"""The quality of 4- and 8-bit weights, by block size and quantisation method.

The model is SmolLM2-135M-Instruct with the demo adapter merged into it, in float32. All linear weights and the tied
embedding are replaced by their dequantised values, so that nothing but the weights differs. ``calibrated`` rows use the
weights that ``export`` writes; the other methods quantise each block by itself. ``auto`` rows have a share of the bytes
between all layers at 4 bits and all at 8. The text is the documentation of this package and the conversations of the
demo data, in sequences of 512 tokens, and every position is predicted.

Prints a table in Markdown, and takes some twenty minutes of processor time.
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
from pos2d.exporter.formats.onnx import format as onnx_format
from pos2d.exporter.formats.onnx.weight_layout import embedding_block
from pos2d.exporter.formats.options import ExportOptions
from pos2d.exporter.quantisation.blockwise import SEARCHED_SPANS, dequantise, quantise
from pos2d.onnx_io import DATA_FILE, FUSED_LAYERS
from pos2d.recipes import BITS, DEFAULT_BLOCKS, GraphQuant
from pos2d.sources.source import from_merged

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "examples" / "demo_adapter" / "lora.pth"
LENGTH = 512
BATCH = 4
HEAD = "model.embed_tokens.weight"
COLUMNS = ("bits", "block", "scales", "head", "bits a weight", "MB", "noise", "KL", "top-1")

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]
Method = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Cost:
    """The distance from the unquantised model: mean KL(reference || quantised) in nats, and top-1 agreement."""

    kl: float
    top1: float


class Study:
    """A float32 model whose weights can be replaced, a text, and the model's log-probabilities with its own weights."""

    def __init__(self, artifact: Path, sequences: int) -> None:
        loaded = runtime.load(artifact, device="cpu", dtype="float32")
        self.model: Any = loaded.backend._model  # type: ignore[attr-defined]
        self.ids = text_of(loaded.tokenizer)[:sequences]
        # Inputs instead of token ids, to run only some layers of the model.
        self.model_inputs: dict[str, Tensor] | None = None
        self._parameters = {n: p for n, p in self.model.model.named_parameters(prefix="model") if p.ndim == 2}
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._reference = [logits.log_softmax(-1) for logits in self.logits()]

    @torch.inference_mode()
    def logits(self, count: int | None = None) -> Iterator[Tensor]:
        """The logits ``[positions, V]`` of the first ``count`` sequences (None: of all), one batch at a time."""
        for ids in torch.split(self.ids[:count], BATCH):
            times = torch.arange(LENGTH).expand(len(ids), -1)
            mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
            pairs = torch.stack([torch.zeros_like(times), times], dim=-1)
            inputs = self.model_inputs or {"input_ids": ids}
            yield self.model(
                **inputs, position_ids=times, pos2d=pairs, attention_mask=mask, use_cache=False
            ).logits.flatten(0, 1)

    @torch.inference_mode()
    def cost(self, quantised: Tensors, count: int | None = None) -> Cost:
        """The cost of ``quantised`` weights in place of the model's, over the first ``count`` sequences."""
        for name, weight in quantised.items():
            self._parameters[name].copy_(weight)
        divergence, agreements, positions = 0.0, 0, 0
        for logits, reference in zip(self.logits(count), self._reference, strict=False):
            reference = reference[: len(logits)]
            for actual, expected in zip(torch.split(logits, LENGTH), torch.split(reference, LENGTH), strict=True):
                actual = actual.log_softmax(-1)
                divergence += float((expected.exp() * (expected - actual)).sum())
                agreements += int((actual.argmax(-1) == expected.argmax(-1)).sum())
            positions += len(logits)
        for name in quantised:
            self._parameters[name].copy_(self.weights[name])
        return Cost(divergence / positions, agreements / positions)


def text_of(tokenizer: Any) -> Tensor:
    """Token ids ``[sequences, 512]``: sequences of documentation and of conversations alternate."""
    pages = "\n\n".join(
        p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    lines = [
        json.loads(line) for line in (ROOT / "examples/demo_data/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chats = [[{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}] for row in lines]
    conversations = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats[:200])
    tokens = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in (pages, conversations)]
    halves = [ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH) for ids in tokens]
    shortest = min(map(len, halves))
    return torch.stack([half[:shortest] for half in halves], dim=1).flatten(0, 1)


def nearest(values: Tensor, bits: int, block_size: int) -> Tensor:
    """Round to nearest, with the largest magnitude of a block at the end of the range."""
    return dequantise(*quantise(values, bits, block_size, spans=(2.0 ** (bits - 1),)), bits, values.shape[1])


def searched(values: Tensor, bits: int, block_size: int) -> Tensor:
    """Round to nearest with the scale of least squared error among a few."""
    return dequantise(*quantise(values, bits, block_size, SEARCHED_SPANS[bits]), bits, values.shape[1])


def in_blocks(method: Callable[[Tensor, int], Tensor], values: Tensor, bits: int, block_size: int) -> Tensor:
    """Apply a method for blocks ``[n, block_size]`` to a matrix."""
    padded = pad(values, (0, -values.shape[1] % block_size))
    chunks = torch.split(padded.reshape(-1, block_size), (1 << 18) // block_size)
    return torch.cat([method(blocks, bits) for blocks in chunks]).reshape(padded.shape)[:, : values.shape[1]]


def k_quant(blocks: Tensor, bits: int) -> Tensor:
    """Scale and minimum as the k-quants of llama.cpp and ONNX Runtime search them, the minimum rounded to steps."""
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
    stored: Tensor = ((blocks / scale + zero).round().clamp(0, top) - zero) * scale
    return stored


def hqq(blocks: Tensor, bits: int) -> Tensor:
    """Half-quadratic quantisation: zero points that minimise a robust norm of the error, then rounded to steps."""
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
    stored: Tensor = ((blocks / scale + zero).round().clamp(0, top) - zero) * scale
    return stored


METHODS: dict[str, Method] = {
    "nearest": nearest,
    "searched": searched,
    "k-quant, zero points": partial(in_blocks, k_quant),
    "hqq, zero points": partial(in_blocks, hqq),
}
# Bits, block size and method of the layers, and bits of the head. Without calibration, exports are "searched" at 8 bits
# and "nearest" at 4.
ROWS = (
    *((8, block_size, "searched", 8) for block_size in (16, 32, 64, 128)),
    *((4, 32, name, 8) for name in METHODS),
    (4, 32, "nearest", 4),
    *((4, block_size, "nearest", 8) for block_size in (64, 128)),
)
# Calibrated exports.
EXPORTED: tuple[tuple[GraphQuant, int], ...] = (
    ("int8", 16),
    ("int8", 32),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
)
# Shares of the bytes between all layers at 4 bits and all at 8.
SHARES = (0.25, 0.5)


def bits_of(bits: int, block_size: int, method: str) -> float:
    """Bits for each weight: its value, and its part of a float32 scale and, with the method, of a zero point."""
    return bits + (32 + bits * method.endswith("zero points")) / block_size


@click.command()
@click.option("--base-model", type=click.Path(path_type=Path, exists=True), default=ROOT / "demo" / "base")
@click.option(
    "--merged", type=click.Path(path_type=Path, exists=True), help="A merged directory to use instead of merging first."
)
@click.option("--sequences", default=20, show_default=True, help="Number of sequences of 512 tokens.")
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
        for quant, block_size in EXPORTED:
            click.echo(f"| {' | '.join(exported_row(study, merged, quant, block_size))} |")
        for share in SHARES:
            click.echo(f"| {' | '.join(exported_row(study, merged, 'auto', DEFAULT_BLOCKS['auto'], share))} |")


def size_between(merged: Path, block_size: int, share: float) -> str:
    """The bytes at ``share`` of the way from all layers at 4 bits to all at 8."""
    int4, int8 = (
        onnx_format.plan(from_merged(merged), ExportOptions(quant=quant, block_size=block_size)).nbytes
        for quant in ("int4", "int8")
    )
    return str(int(int4 + share * (int8 - int4)))


def row_of(study: Study, bits: int, block_size: int, method: str, head_bits: int) -> tuple[str, ...]:
    quantised = {n: METHODS[method](w, bits, block_size) for n, w in study.weights.items() if n != HEAD}
    head_block = min(block_size, embedding_block(study.weights[HEAD].shape[1]))
    quantised[HEAD] = (nearest if head_bits == 4 else searched)(study.weights[HEAD], head_bits, head_block)
    sizes = {n: w.numel() for n, w in study.weights.items()}
    head = bits_of(head_bits, head_block, "")
    total = sum(s * (head if n == HEAD else bits_of(bits, block_size, method)) for n, s in sizes.items())
    mean = total / sum(sizes.values())
    return (str(bits), str(block_size), method, str(head_bits), *cells_of(study, quantised, mean))


def exported_row(
    study: Study, merged: Path, quant: GraphQuant, block_size: int, share: float | None = None
) -> tuple[str, ...]:
    size = None if share is None else size_between(merged, block_size, share)
    with tempfile.TemporaryDirectory() as directory:
        exporter.export(
            merged, Path(directory) / "graph", quant=quant, block_size=block_size, target_size=size, no_verify=True
        )
        quantised = weights_of(Path(directory) / "graph", study)
        nbytes = (Path(directory) / "graph" / DATA_FILE).stat().st_size
    bits = str(BITS[quant]) if share is None else f"auto, {share:.0%}"
    mean = 8 * nbytes / sum(w.numel() for w in study.weights.values())
    return (bits, str(block_size), "calibrated", "8", *cells_of(study, quantised, mean))


def weights_of(graph: Path, study: Study) -> dict[str, Tensor]:
    """The dequantised weights of an exported graph, by the names that they have in the model."""
    model = onnx.load(graph / "model.onnx")
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights: dict[str, Tensor] = {}
    for node in (node for node in model.graph.node if node.op_type == "MatMulNBits"):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        packed, scales = (torch.from_numpy(initializers[name].copy()) for name in node.input[1:3])
        values = dequantise(packed, scales, attributes["bits"], attributes["K"])
        parent = node.input[1].rpartition(".")[0].rpartition(".")[0]
        names = [node.input[1]]
        if names[0] not in study.weights and parent:
            names = [f"{parent}.{module}.weight" for module in FUSED_LAYERS[parent.rpartition(".")[2]]]
        names = [name if name in study.weights else HEAD for name in names]
        weights |= zip(names, torch.split(values, [len(study.weights[name]) for name in names]), strict=True)
    return weights


def cells_of(study: Study, quantised: Tensors, mean_bits: float) -> tuple[str, ...]:
    noises = [relative_noise(study.weights[n], w) ** 2 for n, w in quantised.items() if n != HEAD]
    cost = study.cost(quantised)
    size = mean_bits * sum(w.numel() for w in study.weights.values()) / 8
    noise = math.sqrt(sum(noises) / len(noises))
    return f"{mean_bits:.2f}", f"{size / 1e6:.1f}", f"{noise:.2%}", f"{cost.kl:.2e}", f"{cost.top1:.1%}"


def relative_noise(weight: Tensor, stored: Tensor) -> float:
    return math.sqrt(float((stored - weight).square().sum() / weight.square().sum()))


if __name__ == "__main__":
    bench()
