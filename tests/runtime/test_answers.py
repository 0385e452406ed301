"""From columns to texts: stops, end tokens, log probabilities, and many prompts over one context."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pos2d import runtime
from pos2d.errors import InputError, UsageError
from pos2d.runtime.text.completions import collect
from pos2d.runtime.text.detokenizer import StreamDetokenizer
from tests.conftest import Golden

PROMPTS = ["one", "and two", "third", "4", "the fifth of them"]
CONTEXT = "said before. "


@pytest.fixture
def tokens_fed(talker: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens every forward pass was given."""
    fed: list[int] = []
    forward = talker.backend.forward

    def counting(input_ids: Any, *rest: Any) -> Any:
        fed.append(input_ids.shape[1])
        return forward(input_ids, *rest)

    monkeypatch.setattr(talker.backend, "forward", counting)
    return fed


def free_answer(model: runtime.Model, prompt: str = "one", **options: Any) -> runtime.Completion:
    return model.generate(prompt, max_new_tokens=40, **options)[0]


@pytest.mark.parametrize("seed", range(30))
def test_text_that_grows_is_the_text_of_all_tokens(talker: runtime.Model, seed: int) -> None:
    """Of bytes at random, most of them no characters, with and without stops."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 256, size=60).tolist() if seed % 2 else draw.choice([97, 98, 99], size=60).tolist()
    whole = talker.tokenizer.decode(ids, skip_special_tokens=True)
    stops = ["".join(draw.choice(list(whole), size=size)) for size in (1, 2, 3)] if seed % 3 else []
    text = StreamDetokenizer(talker.tokenizer, stops)
    shown = ""
    for token in ids:
        shown += text.append(token)
        assert shown == text.text
        if text.stopped:
            break
    shown += text.close()
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert shown == (whole[: min(ends)] if ends else whole)
    assert text.stopped == bool(ends)


def test_a_stop_cuts_the_answer_and_its_beginning_is_never_shown(talker: runtime.Model) -> None:
    free = free_answer(talker)
    stop = free.text[7:10]
    events = list(talker.stream("one", max_new_tokens=40, stop=(stop, "never said")))
    (answer,) = collect(events, ["one"])
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert free.token_ids[: len(answer.token_ids)] == answer.token_ids
    shown = ""
    for event in events:
        shown += event.text
        assert answer.text.startswith(shown)


def test_end_tokens_of_the_artifact_and_of_the_flags_end_an_answer(talker: runtime.Model) -> None:
    free = free_answer(talker)
    first, second = free.token_ids[4], free.token_ids[9]
    ends = replace(talker, manifest=replace(talker.manifest, eos_token_ids=(299, second, first)))
    cut = free.token_ids[: min(free.token_ids.index(first), free.token_ids.index(second))]
    assert free_answer(ends).token_ids == cut
    assert free_answer(ends).finish_reason == "stop"
    named = talker.tokenizer.convert_ids_to_tokens([first, second])
    assert free_answer(talker, end_token=tuple(named)) == free_answer(ends)
    with pytest.raises(UsageError, match="`end_token` '<nowhere>' is not in the tokenizer"):
        free_answer(talker, end_token=("<nowhere>",))


def test_penalty_and_least_length_are_those_of_transformers_generate(talker: runtime.Model, talking: Any) -> None:
    """Greedy ids beside ``generate`` of the merged model, on every backend."""
    torch_model: Any = runtime.load(talking / "merged", attn_implementation="eager").backend
    prompt = talker.tokenizer("and two").input_ids
    free = talker.generate_ids([prompt], max_new_tokens=24, ignore_eos=True)[0]
    for ours in (
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 12, "eos_token_ids": [free[3], free[6]]},
        {"repetition_penalty": 0.8, "min_new_tokens": 6, "eos_token_ids": [free[2]]},
    ):
        given: Any = dict(ours)
        theirs = {"eos_token_id" if key == "eos_token_ids" else key: value for key, value in given.items()}
        expected = torch_model._model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0, **theirs
        )[0, len(prompt) :].tolist()
        ends = given.get("eos_token_ids", [])
        kept = expected[:-1] if expected[-1] in ends else expected
        assert talker.generate_ids([prompt], max_new_tokens=24, **given)[0] == kept


def test_log_probabilities_are_those_of_the_logits(talker: runtime.Model) -> None:
    (answer,) = talker.generate("one", max_new_tokens=12, logprobs=True, repetition_penalty=1.2)
    prompt = talker.tokenizer("<user>one\n<assistant>").input_ids
    logits = talker.logits([prompt + list(answer.token_ids)])[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(torch.tensor(logits), -1)[range(12), list(answer.token_ids)]
    np.testing.assert_allclose(answer.logprobs or (), expected, atol=1e-4)  # ten times what float32 gives
    assert free_answer(talker).logprobs is None


def test_prompts_in_several_sequences_read_the_context_once(talker: runtime.Model, tokens_fed: list[int]) -> None:
    options: Any = {"max_new_tokens": 6, "visibility": "isolated"}
    together = talker.generate(PROMPTS, CONTEXT, **options)
    whole = sum(tokens_fed)
    tokens_fed.clear()
    assert talker.generate(PROMPTS, CONTEXT, max_branches=2, **options) == together
    assert sum(tokens_fed) == whole
    tokens_fed.clear()
    assert [talker.generate(prompt, CONTEXT, **options)[0] for prompt in PROMPTS] == together
    context = len(talker.tokenizer(f"<system>{CONTEXT}\n").input_ids)
    assert sum(tokens_fed) == whole + (len(PROMPTS) - 1) * context


def test_columnar_prompts_see_those_of_their_own_sequence_alone(talker: runtime.Model) -> None:
    grouped = talker.generate(PROMPTS, CONTEXT, max_branches=2, max_new_tokens=8)
    alone = [talker.generate(PROMPTS[k : k + 2], CONTEXT, max_new_tokens=8) for k in (0, 2, 4)]
    assert grouped == [answer for answers in alone for answer in answers]
    assert grouped != talker.generate(PROMPTS, CONTEXT, max_new_tokens=8)


def test_stride_and_alignment_can_be_others_than_the_artifacts(talker: runtime.Model) -> None:
    plain = talker.generate(PROMPTS, max_new_tokens=8)
    spec = replace(talker.manifest.rope_2d, branch_stride=3, align_to="right")
    other = replace(talker, manifest=replace(talker.manifest, rope_2d=spec))
    moved = talker.generate(PROMPTS, max_new_tokens=8, branch_stride=3, align_to="right")
    assert moved == other.generate(PROMPTS, max_new_tokens=8) != plain
    with pytest.raises(UsageError, match="`max_branches` 0 must be at least 1"):
        talker.generate(PROMPTS, max_branches=0)
    with pytest.raises(UsageError, match="`branch_stride` 0 must be 1 to 16777216"):
        talker.generate(PROMPTS, branch_stride=0)


def test_draws_repeat_with_the_seed_on_every_backend(talking: Any) -> None:
    models = [runtime.load(talking / kind) for kind in ("merged", "onnx")]
    options: Any = {"max_new_tokens": 10, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 5}
    drawn = [model.generate(PROMPTS, **options) for model in models]
    assert drawn[0] == drawn[1] == models[0].generate(PROMPTS, **options)
    assert drawn[0] != models[0].generate(PROMPTS, **{**options, "seed": 6})


def test_isolated_prompts_with_a_penalty_are_answered_as_alone(talker: runtime.Model) -> None:
    options: Any = {"max_new_tokens": 10, "repetition_penalty": 1.5, "visibility": "isolated"}
    assert talker.generate(PROMPTS, CONTEXT, **options) == [
        talker.generate(prompt, CONTEXT, **options)[0] for prompt in PROMPTS
    ]


def test_everything_is_checked_before_the_first_event(talker: runtime.Model) -> None:
    for wrong, error in (
        ({"prompts": []}, InputError),
        ({"prompts": ["x" * 600]}, InputError),
        ({"prompts": ["a", "x" * 600], "max_branches": 1}, InputError),
        ({"prompts": "a", "temperature": -1.0}, UsageError),
        ({"prompts": "a", "end_token": ("<nowhere>",)}, UsageError),
    ):
        with pytest.raises(error):
            talker.stream(**wrong)


def test_prompts_of_a_larger_tokenizer_are_refused(talker: runtime.Model) -> None:
    small = replace(talker, manifest=replace(talker.manifest, vocab_size=100))
    for ask in (lambda: small.generate("zzz"), lambda: small.chat([{"role": "user", "content": "zzz"}])):
        with pytest.raises(InputError, match="outside the vocabulary of 100"):
            ask()


def test_options_that_do_not_exist_are_refused(talker: runtime.Model) -> None:
    asking: list[Any] = [talker.generate, talker.stream, lambda p, **o: runtime.run(talker.path, p, **o)]
    for ask in asking:
        for name, similar in (("max_tokens", "max_new_tokens"), ("temprature", "temperature")):
            with pytest.raises(TypeError, match=f"has no keyword '{name}'; did you mean '{similar}'"):
                ask("one", **{name: 3})
    with pytest.raises(TypeError, match=r"generate_ids\(\) has no keyword 'temprature'; did you mean 'temperature'"):
        talker.generate_ids([[1]], temprature=0.9)


def test_one_text_may_stand_where_several_may(talker: runtime.Model) -> None:
    (answer,) = runtime.run(talker.path, "one", max_new_tokens=9, stop="e").completions
    assert answer == talker.generate(["one"], max_new_tokens=9, stop=["e"])[0]


def test_an_asynchronous_call_that_is_cancelled_ends(talker: runtime.Model, tokens_fed: list[int]) -> None:
    async def leave() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(talker.agenerate("one", max_new_tokens=480), 0.05)
        fed = len(tokens_fed)
        await talker.agenerate("two", max_new_tokens=2)
        assert len(tokens_fed) < fed + 10

    asyncio.run(leave())


def test_ids_have_no_texts(qwen2: Golden, model_of: Any) -> None:
    with pytest.raises(UsageError, match="`stop` and `end_token` are texts"):
        model_of(qwen2, "onnx").generate_ids([[1, 2]], stop=("x",))


def test_asynchronous_answers_are_the_same_and_leave_the_loop_free(talker: runtime.Model) -> None:
    async def ask() -> tuple[Any, ...]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        clock = asyncio.create_task(tick())
        answers = await talker.agenerate(PROMPTS, CONTEXT, max_new_tokens=8)
        events = [event async for event in talker.astream(PROMPTS, CONTEXT, max_new_tokens=8)]
        turn = await talker.achat([{"role": "user", "content": "one"}], max_new_tokens=8)
        clock.cancel()
        return answers, events, turn, ticks

    answers, events, turn, ticks = asyncio.run(ask())
    assert answers == talker.generate(PROMPTS, CONTEXT, max_new_tokens=8) == collect(events, PROMPTS)
    assert turn == talker.chat([{"role": "user", "content": "one"}], max_new_tokens=8)
    assert ticks > 10


def test_an_asynchronous_stream_that_is_left_ends(talker: runtime.Model, tokens_fed: list[int]) -> None:
    async def leave() -> int:
        events = talker.astream("one", max_new_tokens=400)
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]
        return (await talker.agenerate("one", max_new_tokens=3))[0].token_ids.__len__()

    assert asyncio.run(leave()) == 3
    assert len(tokens_fed) < 200


def test_asynchronous_errors_arrive(talker: runtime.Model) -> None:
    async def ask() -> None:
        async for _ in talker.astream("x" * 600):
            pass

    with pytest.raises(InputError, match="shorten"):
        asyncio.run(ask())
