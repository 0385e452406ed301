"""Float16 graphs: every way to quantise them gives the model of the float32 graph that is quantised in the same way."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pos2d import exporter, runtime
from pos2d.layout import build_layout
from pos2d.onnx_io import LINEAR_KINDS
from pos2d.runtime.backends.onnx.backend import OnnxBackend
from pos2d.runtime.engine.decode import forward
from pos2d.runtime.evaluation.parity import compare
from pos2d.sources.tensors.rounding import round_nearest, round_stochastic
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base
from tests.bounds import logits_bound

BASES = {"tied": "llama", "untied": "qwen3 with biases"}
QUANTISED: list[dict[str, Any]] = [
    {"quant": "int4"},
    {"quant": "int8"},
    {"quant": "int4", "block_size": 16},
    {"quant": "int8", "block_size": 256},
    {"quant": "auto", "target_size": "1GB"},
    {"quant": "auto", "target_size": "140kB", "no_calibration": True},
    {"quant": "int4", "no_calibration": True},
    {"quant": "int8", "no_calibration": True, "block_size": 64},
    {"quant": "int4", "skip_modules": "v_proj,lm_head,model.layers.1"},
    {"quant": "int4", "float_activations": "down_proj,q_proj", "block_size": 32},
    {"quant": "int8", "skip_modules": "down_proj"},
]


@pytest.fixture(scope="module", params=BASES)
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    base = write_base(directory / "base", CONFIGS[BASES[request.param]])
    lora = write_adapter(directory / "lora.pth", random_adapter(linear_modules(base)))
    return {"base_model": base, "lora": lora, "rope_2d_ratio": 0.5, "no_verify": True}


@pytest.mark.parametrize("options", QUANTISED, ids=lambda options: "-".join(map(str, options.values())))
def test_every_quantisation_in_float16(inputs: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    logits = []
    for dtype in ("float32", "float16"):
        exporter.export(None, tmp_path / dtype, dtype=dtype, **options, **inputs)
        model = runtime.load(tmp_path / dtype)
        backend = model.backend
        assert isinstance(backend, OnnxBackend)
        layouts = [build_layout(ids, model.manifest.rope_2d) for ids in ([[5, 6, 7, 8]], [[9, 10, 11], [12, 13]])]
        # An activation that lies halfway between two of its 8-bit steps may fall to either side: no bound without it.
        precise = backend.with_float_activations(LINEAR_KINDS)
        assert all(compare("", *(forward(b, x, len(x)) for b in (precise, backend))).mean_kl < 0.05 for x in layouts)
        logits.append([forward(precise, layout, len(layout)) for layout in layouts])
    kinds = {onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8}
    weights = onnx.load(tmp_path / "float16" / "model_batch.onnx", load_external_data=False).graph.initializer
    assert {tensor.data_type for tensor in weights if tensor.external_data} <= kinds
    for single, half in zip(*logits, strict=True):
        np.testing.assert_allclose(half, single, rtol=0, atol=logits_bound(single, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_rounded_alike_in_every_memory_order(dtype: torch.dtype) -> None:
    exact = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for view in (exact.T, exact[:, ::2], exact.reshape(2, 3, 10).permute(2, 0, 1)):
        assert torch.equal(
            round_nearest(view, dtype), round_nearest(view.clone(memory_format=torch.contiguous_format), dtype)
        )
        draws = [torch.Generator().manual_seed(1) for _ in range(2)]
        made = [round_stochastic(x, dtype, draw) for x, draw in zip((view, view.contiguous()), draws, strict=True)]
        assert torch.equal(*made)
