"""The torch backend: a cache that is written in place, chunked prefill, and attention that reads the cache in place."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pos2d import runtime
from pos2d.errors import InputError
from pos2d.layout import build_layout
from pos2d.runtime.backends.torch import kv_cache as cache
from pos2d.runtime.engine import decode as engine
from tests.bounds import gamma, in_turn, logits_bound
from tests.conftest import BACKENDS, Golden

ModelOf = Callable[..., runtime.Model]
KERNEL_SHAPES = ((1, 96, 64), (3, 100, 200), (16, 33, 576))
KERNEL_PROGRAM = """
import json, sys
import torch
from pos2d.runtime.backends.torch.triton_int8 import int8_product

torch.manual_seed(0)
for rows, outputs, inputs, bound in json.loads(sys.argv[1]):
    x, weight = torch.randn(rows, inputs).half(), torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    steps = torch.rand(outputs)
    wide = weight.double()
    exact, magnitude = x.double() @ wide.T * steps.double(), x.double().abs() @ wide.abs().T * steps.double()
    assert ((int8_product(x, weight, steps).double() - exact).abs() <= bound * magnitude).all()
"""
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]
CONTEXT = list(range(20, 31))


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_chunked_prefill_gives_the_same_logits(
    golden: Golden, kind: str, visibility: Any, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(golden, kind, device="cpu", dtype="float32")
    layout = build_layout(PROMPTS, model.manifest.rope_2d, CONTEXT, visibility)
    whole = engine.forward(model.backend, layout, len(layout))[list(layout.last)]
    bound = logits_bound(whole)
    np.testing.assert_allclose(engine.prefill(model.backend, layout, model.backend.new_cache(64)), whole, atol=bound)
    for chunk in (1, 5, len(layout) - 1):
        monkeypatch.setattr(type(model.backend), "prefill_chunk", chunk)
        found = engine.prefill(model.backend, layout, model.backend.new_cache(64))
        np.testing.assert_allclose(found, whole, atol=bound)


def test_rows_are_those_of_all_logits(golden: Golden, model_of: ModelOf) -> None:
    for kind in BACKENDS:
        model = model_of(golden, kind, device="cpu", dtype="float32")
        layout = build_layout(PROMPTS, model.manifest.rope_2d)
        given = (layout.ids[None], layout.positions[None], layout.pos2d[None], layout.mask()[None])
        rows = np.array([9, 0, 4])
        found, expected = model.backend.forward(*given, rows=rows), model.backend.forward(*given)[:, rows]
        np.testing.assert_allclose(found, expected, atol=logits_bound(expected))


def test_both_attentions_agree(golden: Golden, model_of: ModelOf) -> None:
    """Fused attention over grouped heads gives what plain products over repeated heads give, also with branches."""
    fused, plain = (
        model_of(golden, "merged", device="cpu", dtype="float32", attn_implementation=name)
        for name in ("sdpa", "eager")
    )
    for prompts in (PROMPTS[:1], PROMPTS):
        made = [model.generate_ids(prompts, CONTEXT, max_new_tokens=8, ignore_eos=True) for model in (fused, plain)]
        assert made[0] == made[1]
    layout = build_layout(PROMPTS, fused.manifest.rope_2d, CONTEXT)
    one, other = (engine.forward(model.backend, layout, len(layout)) for model in (fused, plain))
    np.testing.assert_allclose(one, other, atol=logits_bound(other))


def test_the_growing_cache_keeps_everything_and_is_rarely_copied() -> None:
    torch.manual_seed(0)
    layers = cache.GrowingCache(8)
    fed: list[torch.Tensor] = []
    addresses = set()
    for count in (3, *[1] * 40, 9, 1):
        fed.append(torch.randn(1, 2, count, 8))
        keys, values = layers.update(fed[-1], fed[-1] + 1, 0)
        expected = torch.cat(fed, dim=2)
        torch.testing.assert_close(keys, expected, rtol=0, atol=0)
        torch.testing.assert_close(values, expected + 1, rtol=0, atol=0)
        assert layers.get_seq_length() == expected.shape[2]
        addresses.add(keys.data_ptr())
    assert len(addresses) <= 4  # 8, then doubled


def test_a_cache_of_fixed_size_gives_the_same_steps(
    golden: Golden, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs are captured over such a cache; on the CPU it runs without them."""
    model = model_of(golden, "merged", device="cpu", dtype="float32")
    expected = model.generate_ids(PROMPTS, CONTEXT, max_new_tokens=9, ignore_eos=True)
    made: list[cache.FixedCache] = []

    def fixed(capacity: int) -> cache.FixedCache:
        made.append(cache.FixedCache(capacity))
        return made[-1]

    monkeypatch.setattr(model.backend, "new_cache", fixed)
    assert model.generate_ids(PROMPTS, CONTEXT, max_new_tokens=9, ignore_eos=True) == expected
    assert made[0].length == sum(map(len, PROMPTS)) + len(CONTEXT) + 8 * len(PROMPTS)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch's builds for CUDA")
def test_the_kernel_for_gpus() -> None:
    """In Triton's interpreter, which multiplies float16 as a GPU does (and bfloat16 not at all)."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # Sums in float32, with a product by the steps; the result is a half.
    bounds = [in_turn(gamma(inputs + 1, torch.float32), gamma(1, torch.float16)) for _, _, inputs in KERNEL_SHAPES]
    given = json.dumps([[*shape, bound] for shape, bound in zip(KERNEL_SHAPES, bounds, strict=True)])
    command = [sys.executable, "-c", KERNEL_PROGRAM, given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_step_in_bfloat16_is_near_the_step_in_float32(golden: Golden, model_of: ModelOf) -> None:
    """The packed int8 product of a decode step, compared with converted weights in float32."""
    exact = model_of(golden, "8bit", device="cpu", dtype="float32")
    packed = model_of(golden, "8bit", device="cpu")
    packed_backend: Any = packed.backend
    assert packed_backend.dtype == torch.bfloat16
    layout = build_layout(PROMPTS, exact.manifest.rope_2d)
    near, far = (engine.forward(model.backend, layout, len(layout)) for model in (exact, packed))
    assert np.abs(near - far).max() < logits_bound(near, torch.bfloat16)
    np.testing.assert_allclose(np.corrcoef(near.ravel(), far.ravel())[0, 1], 1, atol=2e-3)


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_a_cache_is_never_larger_than_the_model_can_fill(
    golden: Golden, visibility: Any, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(golden, "merged", device="cpu", dtype="float32")
    made: list[cache.FixedCache] = []

    def fixed(capacity: int) -> cache.FixedCache:
        made.append(cache.FixedCache(capacity))
        return made[-1]

    monkeypatch.setattr(model.backend, "new_cache", fixed)
    limit = model.manifest.context_length
    given: Any = {"max_new_tokens": 2_000_000_000, "ignore_eos": True, "visibility": visibility}
    answers = model.generate_ids(PROMPTS, CONTEXT, **given)
    assert made[0].length <= made[0].capacity <= limit * (1 if visibility == "columnar" else len(PROMPTS))
    assert len(answers[0]) > 1


def test_logits_that_are_not_finite_are_no_answer(golden: Golden, model_of: ModelOf) -> None:
    model = model_of(golden, "merged", device="cpu", dtype="float32")
    backend: Any = model.backend
    with torch.no_grad():
        backend._model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        model.generate_ids(PROMPTS, max_new_tokens=3)


def test_contexts_and_conversations_over_a_cache_of_fixed_size(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is rewound, and replaced when it is full."""
    model = runtime.load(talking / "merged", device="cpu")

    def written() -> list[Any]:
        answers = model.generate(["one", "and two", "third"], "said before. ", max_branches=2, max_new_tokens=6)
        talk = model.conversation(max_new_tokens=6)
        turns = [list(talk.ask("one")), list(talk.ask_branches(["a", "b"])), list(talk.ask("and two " * 9))]
        return [answers, turns, talk.prefilled_tokens]

    expected = written()
    made: list[cache.FixedCache] = []

    def fixed(capacity: int) -> cache.FixedCache:
        made.append(cache.FixedCache(capacity))
        return made[-1]

    monkeypatch.setattr(model.backend, "new_cache", fixed)
    assert written() == expected
    assert all(one.length <= one.capacity for one in made)
