"""The ONNX backend: a cache in place, the cheapest graph variant that fits, and several sequences in one step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from pos2d import exporter, runtime
from pos2d.errors import InputError, UsageError
from pos2d.layout import build_layout
from pos2d.runtime.backends.onnx import cuda as onnx_cuda
from pos2d.runtime.backends.onnx.backend import OnnxBackend
from pos2d.runtime.engine.decode import forward, prefill
from pos2d.runtime.engine.row_buffers import STEP
from tests.bounds import logits_bound
from tests.conftest import Golden

ArtifactOf = Callable[[Golden, str], Path]


@pytest.fixture
def model(golden: Golden, artifact_of: ArtifactOf) -> runtime.Model:
    """Loaded for each test, because a model remembers which graph variant it needs."""
    return runtime.load(artifact_of(golden, "onnx"))


def backend_of(model: runtime.Model) -> OnnxBackend:
    assert isinstance(model.backend, OnnxBackend)
    return model.backend


def prompts_of(golden: Golden) -> list[list[int]]:
    return golden.facts.get("branch_inputs") or [golden.tensors["single.input_ids"][0].tolist()]


def test_the_cheapest_variant_is_loaded_and_never_a_cheaper_one_after_it(golden: Golden, model: runtime.Model) -> None:
    backend, prompt = backend_of(model), golden.tensors["single.input_ids"][0].tolist()
    assert backend.graphs.current is None
    alone = model.generate_ids([prompt], max_new_tokens=4, ignore_eos=True)
    assert backend.graphs.current == "causal"
    model.generate_ids([prompt, prompt[:2]], max_new_tokens=2, ignore_eos=True)
    assert backend.graphs.current == "general"
    assert model.generate_ids([prompt], max_new_tokens=4, ignore_eos=True) == alone
    assert backend.graphs.current == "general"


def test_no_cheaper_variant_is_loaded_for_a_context(golden: Golden, model: runtime.Model) -> None:
    backend, prompt = backend_of(model), golden.tensors["single.input_ids"][0].tolist()
    backend.expect_branches(2)
    prefill(backend, build_layout([prompt], model.manifest.rope_2d), backend.new_cache(8))
    assert backend.graphs.current == "general"


def test_the_cache_is_written_in_place_and_grows_in_steps(golden: Golden, model: runtime.Model) -> None:
    backend = backend_of(model)
    layout = build_layout(prompts_of(golden), model.manifest.rope_2d)
    whole = forward(backend, layout, len(layout))
    cache = backend.new_cache(1)
    assert cache.capacity == STEP
    before = {name: value.data_ptr() for name, value in cache._buffers.items()}
    found = [forward(backend, build_layout([[1]], model.manifest.rope_2d), 1, cache)]
    cache.rewind(0)
    found = [
        backend.forward(
            layout.ids[None, s : s + 1],
            layout.positions[None, s : s + 1],
            layout.pos2d[None, s : s + 1],
            layout.mask(s, s + 1)[None],
            cache,
        )[0]
        for s in range(len(layout))
    ]
    assert {name: value.data_ptr() for name, value in cache._buffers.items()} == before
    np.testing.assert_allclose(np.concatenate(found), whole, rtol=0, atol=logits_bound(whole))
    held = {name: value.numpy()[:, :, : len(layout)].copy() for name, value in cache._buffers.items()}
    cache.reserve(STEP + 1)
    assert cache.capacity == 2 * STEP
    for name, values in held.items():
        np.testing.assert_array_equal(cache._buffers[name].numpy()[:, :, : len(layout)], values)


def test_positions_beyond_the_model_are_refused(golden: Golden, model: runtime.Model) -> None:
    layout = build_layout([[1, 2]], model.manifest.rope_2d)
    length = model.manifest.context_length
    with pytest.raises(InputError, match=f"position {length}, the model has {length} positions"):
        backend_of(model).forward(
            layout.ids[None], layout.positions[None] + length - 1, layout.pos2d[None], layout.mask()[None]
        )


def test_only_the_requested_rows_are_computed(golden: Golden, model: runtime.Model) -> None:
    backend, layout = backend_of(model), build_layout(prompts_of(golden), model.manifest.rope_2d)
    whole = forward(backend, layout, len(layout))
    rows = np.array([1, len(layout) - 1])
    arguments = layout.ids[None], layout.positions[None], layout.pos2d[None], layout.mask()[None]
    found = backend.forward(*arguments, None, rows)[0]
    np.testing.assert_allclose(found, whole[rows], rtol=0, atol=logits_bound(whole))


def test_steps_of_fixed_shapes_give_the_same(golden: Golden, model: runtime.Model) -> None:
    """What is captured on a GPU, run on the CPU: inputs at fixed addresses, attention over the whole capacity."""
    backend, prompts = backend_of(model), prompts_of(golden)
    for asked in (prompts[:1], prompts):
        expected = model.generate_ids(asked, max_new_tokens=8, ignore_eos=True)
        backend.fixed_steps = True
        assert model.generate_ids(asked, max_new_tokens=8, ignore_eos=True) == expected
        backend.fixed_steps = False
    assert {key[2] for key in backend.graphs.steps._steps} >= {len(prompts)}


def test_what_would_not_be_computed_on_the_gpu_is_named(golden: Golden, artifact_of: ArtifactOf) -> None:
    settings = ort.SessionOptions()
    settings.add_session_config_entry(onnx_cuda.RECORD_ASSIGNMENT, "1")
    path = artifact_of(golden, "onnx") / "model.onnx"
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    found = onnx_cuda.operators_off_gpu(session.get_provider_graph_assignment_info())
    assert {"GroupQueryAttention", "FusedMatMul", "SkipSimplifiedLayerNormalization"} <= set(found)
    assert not {"Shape", "Range"} & set(found)
    with pytest.raises(UsageError, match="cannot use its CUDA provider"):
        onnx_cuda.check_session(session)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_elsewhere_in_silence(
    qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path
) -> None:
    exporter.export(artifact_of(qwen2, "merged"), tmp_path / "half", dtype="float16")
    with pytest.raises(UsageError, match="`device='cuda'`: ONNX Runtime"):
        runtime.load(tmp_path / "half", device="cuda")


def test_a_gpu_needs_half_precision(golden: Golden, artifact_of: ArtifactOf) -> None:
    with pytest.raises(UsageError, match="needs a float16 graph, this one is float32"):
        runtime.load(artifact_of(golden, "onnx"), device="cuda")
    with pytest.raises(UsageError, match="run on cpu or cuda"):
        runtime.load(artifact_of(golden, "onnx"), device="mps")
