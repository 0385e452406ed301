"""One decoder graph with the inputs and the configuration that onnxruntime-genai expects.

Weights, quantisation and everything but the inputs are those of :mod:`pos2d.exporter.formats.onnx.format`. Of a model
with 2D RoPE the graph computes one branch, in which the branch frequencies never turn.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.exporter.formats.genai.genai_config import GENAI_CONFIG, genai_config
from pos2d.exporter.formats.genai.limits import genai_warnings
from pos2d.exporter.formats.onnx import format as graphs
from pos2d.exporter.formats.onnx.format import OPTIONS, OnnxPlan, check, refuse
from pos2d.exporter.formats.options import ExportOptions
from pos2d.onnx_io import GENAI, GRAPH_FILES
from pos2d.reference import ONE_BRANCH
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.files.json_object import write_json
from pos2d.sources.source import Source

__all__ = ["OPTIONS", "check", "plan", "refuse", "write"]
# GroupQueryAttention, without which onnxruntime-genai has no cache that is written in place, takes no other sizes.
HEAD_DIM_MULTIPLE = 8


def plan(source: Source, options: ExportOptions) -> OnnxPlan:
    """Choose the bits of every layer, and lay out the weight file, as for the other graphs.

    Raises:
        InputError: a model that onnxruntime-genai cannot run.
        UsageError: see :func:`pos2d.exporter.formats.onnx.format.plan`.
    """
    path = source.base.directory / CONFIG
    if source.base.sizes.head_dim % HEAD_DIM_MULTIPLE:
        raise InputError(
            f"{path}: head_dim {source.base.sizes.head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}, as the attention "
            "of onnxruntime-genai needs it; use `format='onnx'`"
        )
    if not source.eos_token_ids:
        raise InputError(
            f"{path} names no end token, and onnxruntime-genai would end at token 0; add `eos_token_id`, or use "
            "`format='onnx'`"
        )
    return replace(graphs.plan(source, options), warnings=tuple(genai_warnings(source)))


def write(source: Source, plan: OnnxPlan, target: Path) -> dict[str, Any]:
    """Write weights, graph and configuration into ``target``; returns the manifest's fields for them.

    Raises:
        InputError: see :func:`pos2d.exporter.formats.onnx.weight_writer.write_weights` and
            :func:`pos2d.exporter.formats.genai.genai_config.genai_config`.
    """
    config = genai_config(source, target, GRAPH_FILES[GENAI])
    held_out, is_text = graphs.held_out_of(source, plan, target)
    alone = [sequence for sequence in held_out if sequence.name == ONE_BRANCH]
    facts = graphs.write_weight_file(source, plan, target, alone, is_text)
    graph = graphs.write_graphs(source, plan, target, (GENAI,), source.one_branch)
    write_json(target / GENAI_CONFIG, config)
    return {**facts, "graph": graph, **source.one_branch_facts}
