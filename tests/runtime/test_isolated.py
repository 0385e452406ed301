"""The law of isolated branches: among others a prompt is answered exactly as alone after the same context."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pos2d import runtime
from pos2d.errors import InputError
from tests.conftest import BACKENDS, Golden

PROMPTS = [[5, 60, 7, 80, 9], [100, 11], [120, 13, 140], [9]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", [None, [20, 210, 22, 230, 24, 250]])
def test_isolated_branches_answer_as_alone(
    golden: Golden, backend: str, context: list[int] | None, model_of: Callable[[Golden, str], runtime.Model]
) -> None:
    model = model_of(golden, backend)

    def ask(prompts: list[list[int]]) -> list[list[int]]:
        return model.generate_ids(prompts, context, max_new_tokens=16, visibility="isolated", ignore_eos=True)

    assert ask(PROMPTS) == [ask([prompt])[0] for prompt in PROMPTS]


def test_one_columnar_branch_after_a_context_is_the_isolated_one(
    golden: Golden, model_of: Callable[[Golden, str], runtime.Model]
) -> None:
    model = model_of(golden, "onnx")
    answers = [
        model.generate_ids(PROMPTS[:1], [20, 21, 22], max_new_tokens=12, visibility=visibility, ignore_eos=True)
        for visibility in ("columnar", "isolated")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_branch_that_ends_frees_its_column(
    qwen2: Golden, backend: str, model_of: Callable[[Golden, str], runtime.Model]
) -> None:
    """An end token stops its branch alone, is not part of the answer, and changes nothing for isolated neighbours."""
    model = model_of(qwen2, backend)
    free = model.generate_ids(PROMPTS, max_new_tokens=10, visibility="isolated", ignore_eos=True)
    end = free[1][4]
    stopped = model.generate_ids(PROMPTS, max_new_tokens=10, visibility="isolated", eos_token_ids=[end])
    assert stopped == [ids[: ids.index(end)] if end in ids else ids for ids in free]
    columns = list(model.stream_ids(PROMPTS, max_new_tokens=10, visibility="isolated", eos_token_ids=end))
    assert columns[-1].finished == tuple("stop" if end in ids else "length" for ids in free)


def test_the_artifacts_own_end_tokens_stop_it(qwen2: Golden, model_of: Callable[[Golden, str], runtime.Model]) -> None:
    model = model_of(qwen2, "onnx")
    (free,) = model.generate_ids(PROMPTS[:1], max_new_tokens=8, ignore_eos=True)
    ending = replace(model, manifest=replace(model.manifest, eos_token_ids=(free[3],)))
    assert ending.generate_ids(PROMPTS[:1], max_new_tokens=8) == [free[: free.index(free[3])]]


def test_draws_at_a_temperature_repeat_with_the_seed_and_differ_without(
    qwen2: Golden, model_of: Callable[[Golden, str], runtime.Model]
) -> None:
    model = model_of(qwen2, "onnx")
    draw = [model.generate_ids(PROMPTS, max_new_tokens=8, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_columns_share_the_positions_of_the_model(
    qwen2: Golden, model_of: Callable[[Golden, str], runtime.Model]
) -> None:
    """Columnar branches stand in one flat sequence, so together they may not be longer than the model."""
    model = model_of(qwen2, "onnx")
    limit = model.manifest.context_length
    halves = [[7] * (limit // 2), [8] * (limit // 2)]
    assert [len(ids) for ids in model.generate_ids(halves, max_new_tokens=3, ignore_eos=True)] == [1, 1]
    isolated = model.generate_ids(halves, max_new_tokens=3, ignore_eos=True, visibility="isolated")
    assert [len(ids) for ids in isolated] == [3, 3]
    with pytest.raises(InputError, match=f"take {limit + 1} positions, the model has {limit}"):
        model.generate_ids([[*halves[0], 9], halves[1]], max_new_tokens=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_stops_at_the_length_of_the_model(
    qwen2: Golden, backend: str, artifact_of: Callable[[Golden, str], Path]
) -> None:
    model = runtime.load(artifact_of(qwen2, backend))
    limit = model.manifest.context_length
    prompt = [7] * (limit - 3)
    (answer,) = model.generate_ids([prompt], max_new_tokens=10, ignore_eos=True)
    assert len(answer) == 4  # three that are fed, and the one that they predict
