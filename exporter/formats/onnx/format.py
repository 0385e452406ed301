"""ONNX decoders that take ``pos2d`` and write their KV cache in place: three graphs that share one weight file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from pos2d.errors import UsageError
from pos2d.exporter.artifact.closing_check import closing_check
from pos2d.exporter.formats.onnx.weight_layout import MIN_BLOCK, WeightLayout, embedding_block, lay_out
from pos2d.exporter.formats.onnx.weight_writer import write_weights
from pos2d.exporter.formats.options import ExportOptions
from pos2d.exporter.quantisation.allocation import allocate_bits
from pos2d.exporter.quantisation.held_out import held_out_tokens
from pos2d.exporter.quantisation.module_names import named_modules
from pos2d.graph_metadata import graph_metadata
from pos2d.onnx_io import DATA_FILE, GRAPH_FILES, GraphFile, GraphInfo, GraphName, GraphTensor
from pos2d.recipes import BITS, BLOCK_SIZES, DEFAULT_BLOCKS, UNCALIBRATED_BLOCK, GraphQuant, GraphRecipe
from pos2d.reference import HeldOut, Reference
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from pos2d.sources.hf_config import rotary_frequencies
from pos2d.sources.source import Source
from pos2d.sources.tensors.tensor_plan import PlannedTensor, plan_tensors
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

OPTIONS = (
    "quant",
    "block_size",
    "skip_modules",
    "float_activations",
    "target_size",
    "dtype",
    "no_verify",
    "no_calibration",
)
DTYPES = ("float32", "float16")
# The graphs of this format; onnxruntime-genai has another.
GRAPHS: tuple[GraphName, ...] = ("causal", "general", "batch")
# The head decides between tokens: "int4" gives it 8 bits (benchmarks/nbits.py has what 4 would cost).
SENSITIVE = (LM_HEAD,)


@dataclass(frozen=True, slots=True, eq=False)
class OnnxPlan:
    """The layout of the weight file, and the ``tensors`` that are written into it, by name.

    ``compared``: a quantised graph is held against the exact model at the end, which writes what that predicts.
    """

    layout: WeightLayout
    tensors: Mapping[str, PlannedTensor]
    recipe: GraphRecipe | None
    compared: bool
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


def refuse(options: ExportOptions) -> None:
    """Check the options of graphs.

    Raises:
        UsageError: values that graphs do not have, or options that do nothing without another.
    """
    if options.quant != "none" and options.quant not in get_args(GraphQuant):
        raise UsageError(
            f"`quant={options.quant!r}` needs `format='bnb'`; `format={options.format!r}` takes `quant` "
            f"{', '.join(get_args(GraphQuant))}, or none"
        )
    if options.dtype not in ("auto", *DTYPES):
        raise UsageError(f"`format={options.format!r}` takes `dtype` {' or '.join(DTYPES)}")
    needs_quant = options.block_size, options.skip_modules, options.float_activations, options.no_calibration
    if options.quant == "none" and any(needs_quant):
        raise UsageError(
            "`block_size`, `skip_modules`, `float_activations` and `no_calibration` belong to `quant`; say how to "
            "quantise, or leave them out"
        )
    if options.block_size is not None and options.block_size not in BLOCK_SIZES:
        raise UsageError(f"`block_size` {options.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if (options.target_size is not None) != (options.quant == "auto"):
        raise UsageError("`quant='auto'` and `target_size` belong together: bits are chosen to fill that size")


def plan(source: Source, options: ExportOptions) -> OnnxPlan:
    """Choose the bits of every layer, and lay out the weight file.

    Raises:
        UsageError: modules that do not exist or leave nothing to quantise, or a size that is too small.
        InputError: values that are not finite, where bits are chosen by what the layers lose.
    """
    merged = plan_tensors(source.base, source.adapters, "float32")
    tensors = {tensor.name: tensor for tensor in merged.tensors}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtype = "float32" if options.dtype == "auto" else options.dtype

    def layout_of(recipe: GraphRecipe | None) -> WeightLayout:
        return lay_out(shapes, source.base.sizes, dtype, recipe)

    recipe = None if options.quant == "none" else _recipe(source.base, merged.tied, options)
    if recipe is not None and options.target_size is not None:
        recipe = allocate_bits(source, merged, recipe, dtype, options.target_size, lambda r: layout_of(r).nbytes)
    return OnnxPlan(layout_of(recipe), tensors, recipe, recipe is not None and not options.no_verify)


def write(source: Source, plan: OnnxPlan, target: Path) -> dict[str, Any]:
    """Write weights and graphs into ``target``; returns the manifest's fields for them.

    Raises:
        InputError: see :func:`pos2d.exporter.formats.onnx.weight_writer.write_weights`.
    """
    held_out, is_text = held_out_of(source, plan, target)
    facts = write_weight_file(source, plan, target, held_out, is_text)
    return facts | {"graph": write_graphs(source, plan, target, GRAPHS, source.spec)}


def check(staging: Path, source: Source, plan: OnnxPlan) -> Mapping[str, Any] | None:
    """Compare the graphs with the model that they were made from; quantised ones with float activations, and with what
    the exact model predicts.

    Float graphs that were made from a base and adapters have no such model to compare with.

    Raises:
        ParityError: they differ by more than they may.
    """
    if plan.recipe is not None:
        return closing_check(staging, None)
    return None if source.reference is None else closing_check(staging, source.reference)


def held_out_of(source: Source, plan: OnnxPlan, target: Path) -> tuple[list[HeldOut], bool]:
    """The sequences on which quantised graphs are compared with the exact model, and whether they are text."""
    sizes = source.base.sizes
    return held_out_tokens(target, sizes.vocab, sizes.context_length) if plan.compared else ([], False)


def write_weight_file(
    source: Source, plan: OnnxPlan, target: Path, held_out: Sequence[HeldOut], is_text: bool
) -> dict[str, Any]:
    """Write the weights, and what the exact model predicts for ``held_out``; returns the manifest's fields for them."""
    calibrated = plan.recipe is not None and plan.recipe.calibrated
    totals, predictions = write_weights(
        source, plan.layout, plan.tensors, target, calibrated=calibrated, held_out=held_out
    )
    if predictions:
        Reference(predictions, is_text).write(target)
    return {
        "dtype": plan.layout.dtype,
        "graph_quant": plan.recipe,
        "ledger": None if plan.recipe is None else {"totals": asdict(totals)},
    }


def write_graphs(
    source: Source, plan: OnnxPlan, target: Path, names: Sequence[GraphName], stated: Rope2DSpec
) -> GraphInfo:
    """Write the graphs ``names`` over the weight file; their metadata states the positions ``stated``."""
    import onnx_ir as ir

    from pos2d.exporter.formats.onnx.attention import ATTENTION_VARIANTS
    from pos2d.exporter.formats.onnx.decoder import build_decoder

    sizes = source.base.sizes
    inv_freq, scaling = _frequencies(source, plan.layout.tied)
    metadata = graph_metadata(
        {
            "family": sizes.family,
            "vocab_size": sizes.vocab,
            "context_length": sizes.context_length,
            "eos_token_ids": source.eos_token_ids,
            "rope_2d": stated.to_dict(),
        }
    )
    graphs: dict[GraphName, GraphFile] = {}
    for name in names:
        variant = ATTENTION_VARIANTS[name]
        if sizes.head_dim % variant.head_dim_multiple:
            continue
        model = build_decoder(sizes, source.spec, inv_freq, scaling, plan.layout, plan.recipe, variant)
        model.metadata_props.update(metadata)
        ir.save(model, target / GRAPH_FILES[name])
        graphs[name] = _describe(model, GRAPH_FILES[name])
    return GraphInfo(DATA_FILE, replace(sizes, tied=plan.layout.tied), graphs)


def _recipe(base: Checkpoint, tied: bool, options: ExportOptions) -> GraphRecipe:
    modules = list(base.linear_shapes())
    skipped = named_modules(options.skip_modules or "", modules, "`skip_modules`")
    if tied and embedding_block(base.tensors[EMBEDDING].shape[1]) < MIN_BLOCK:
        skipped = (*skipped, LM_HEAD)
    quant = cast(GraphQuant, options.quant)
    bits = {module: BITS[quant] for module in modules if module not in skipped}
    if not bits:
        raise UsageError(f"`skip_modules={options.skip_modules!r}` leaves nothing to quantise")
    bits |= {module: 8 for module in SENSITIVE if module in bits}
    floating = named_modules(options.float_activations, modules, "`float_activations`")
    eight_bit = [module for module in floating if bits.get(module) == 8]
    if eight_bit:
        raise UsageError(
            f"`float_activations`: {eight_bit[0]} has 8 bits, with which float activations are a hundred times slower; "
            "leave the layer unquantised with `skip_modules` instead"
        )
    block = options.block_size or (UNCALIBRATED_BLOCK if options.no_calibration else DEFAULT_BLOCKS[quant])
    float_activations = tuple(module for module in floating if module in bits)
    return GraphRecipe(quant, block, bits, float_activations, calibrated=not options.no_calibration)


def _frequencies(source: Source, tied: bool) -> "tuple[np.ndarray, float]":
    """Inverse frequencies, float32 ``[F]``, and the attention scaling, both as the torch model computes them."""
    return rotary_frequencies(source.base, source.spec, tied)


def _describe(model: "ir.Model", file: str) -> GraphFile:
    """What the manifest says of a graph."""

    def describe(value: "ir.Value") -> GraphTensor:
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
        return GraphTensor(str(value.name), value.dtype.numpy().name if value.dtype is not None else "unknown", shape)

    return GraphFile(
        file=file,
        opsets=dict(model.opset_imports),
        nodes=len(model.graph),
        inputs=tuple(map(describe, model.graph.inputs)),
        outputs=tuple(map(describe, model.graph.outputs)),
    )
