"""ONNX decoders that take ``pos2d``, with a KV cache written in place: three graphs over one file of weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pos2d.errors import UsageError
from pos2d.exporter.artifact.hf_config import model_config
from pos2d.exporter.formats.onnx.weight_layout import (
    DATA_FILE,
    MIN_BLOCK,
    GraphWeights,
    embedding_block,
    lay_out_weights,
)
from pos2d.exporter.formats.onnx.weight_writer import write_weights
from pos2d.exporter.formats.wanted import Wanted
from pos2d.exporter.inputs.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from pos2d.exporter.quantisation.allocation import spend
from pos2d.exporter.quantisation.module_names import named_modules
from pos2d.exporter.quantisation.totals import QuantTotals
from pos2d.exporter.sources.source import Source
from pos2d.exporter.tensors.plan import MergePlan, plan_merge
from pos2d.graph_recipe import BITS, DEFAULT_BLOCKS, UNCALIBRATED_BLOCK, GraphQuant, GraphRecipe

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

GRAPH_FILES = {"causal": "model_causal.onnx", "general": "model.onnx", "batch": "model_batch.onnx"}
# The head decides between tokens: "int4" has 8 bits there (benchmarks/nbits.py has what 4 would cost).
SENSITIVE = (LM_HEAD,)


@dataclass(frozen=True, slots=True, eq=False)
class OnnxPlan:
    weights: GraphWeights
    recipe: GraphRecipe | None
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes


def plan_onnx(source: Source, wanted: Wanted) -> OnnxPlan:
    """Lay out the result.

    Raises:
        UsageError: a module that is not there, none that is left to quantise, or a size that is too small.
    """
    merged = plan_merge(source.base, source.adapters, "float32")
    dtype = "float32" if wanted.dtype == "auto" else wanted.dtype
    recipe = None if wanted.quant is None else _recipe(source.base, merged, wanted)
    if recipe is not None and wanted.target_size is not None:
        recipe = spend(source, merged, recipe, dtype, wanted.target_size)
    return OnnxPlan(lay_out_weights(merged, source.base.sizes, dtype, recipe), recipe, dtype)


def write_onnx(source: Source, plan: OnnxPlan, target: Path) -> tuple[dict[str, Any], QuantTotals]:
    """Write graphs and weights into ``target``; returns what a manifest says of the graphs.

    Raises:
        InputError: see :func:`pos2d.exporter.formats.onnx.weight_writer.write_weights`.
    """
    import onnx_ir as ir

    from pos2d.exporter.formats.onnx.attention import ATTENDING
    from pos2d.exporter.formats.onnx.decoder import build_decoder

    calibrated = plan.recipe is not None and plan.recipe.calibrated
    totals = write_weights(source, plan.weights, target, calibrated=calibrated)
    sizes = source.base.sizes
    inv_freq, scaling = _frequencies(source, plan.weights.tied)
    graphs = {}
    for name, attending in ATTENDING.items():
        if sizes.head_dim % attending.head_dims:
            continue
        model = build_decoder(sizes, source.spec, inv_freq, scaling, plan.weights, plan.recipe, attending)
        ir.save(model, target / GRAPH_FILES[name])
        graphs[name] = {"file": GRAPH_FILES[name], **_describe(model)}
    return {"data": DATA_FILE, "sizes": asdict(sizes) | {"tied": plan.weights.tied}, "graphs": graphs}, totals


def _recipe(base: Checkpoint, plan: MergePlan, wanted: Wanted) -> GraphRecipe:
    modules = list(base.linear_shapes())
    skipped = named_modules(wanted.skip_modules or "", modules, "--skip-modules")
    if plan.tied and embedding_block(base.tensors[EMBEDDING].shape[1]) < MIN_BLOCK:
        skipped = (*skipped, LM_HEAD)
    quant = cast(GraphQuant, wanted.quant)
    bits = {module: BITS[quant] for module in modules if module not in skipped}
    if not bits:
        raise UsageError(f"--skip-modules {wanted.skip_modules} leaves nothing to quantise")
    bits |= {module: 8 for module in SENSITIVE if module in bits}
    floating = named_modules(wanted.float_activations, modules, "--float-activations")
    wide = [module for module in floating if bits.get(module) == 8]
    if wide:
        raise UsageError(
            f"--float-activations: {wide[0]} has 8 bits, which are a hundred times slower so; leave it as it is with "
            "--skip-modules instead"
        )
    block = wanted.block_size or (UNCALIBRATED_BLOCK if wanted.no_calibration else DEFAULT_BLOCKS[quant])
    kept = tuple(module for module in floating if module in bits)
    return GraphRecipe(quant, block, bits, kept, calibrated=not wanted.no_calibration)


def _frequencies(source: Source, tied: bool) -> "tuple[np.ndarray, float]":
    """Inverse frequencies ``[F]`` and attention scaling, as the torch model computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # The other families' class is the same code.
    rotary = LlamaRotaryEmbedding(model_config(source.base, source.spec, tied))
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def _describe(model: "ir.Model") -> Mapping[str, Any]:
    """Opsets, number of nodes, every input and output with its type and shape (strings are named ones)."""

    def describe(value: "ir.Value") -> dict[str, Any]:
        dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
        dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
        return {"name": value.name, "dtype": dtype, "shape": dims}

    return {
        "opsets": dict(model.opset_imports),
        "nodes": len(model.graph),
        "inputs": [describe(value) for value in model.graph.inputs],
        "outputs": [describe(value) for value in model.graph.outputs],
    }
