"""The engine: streams of events from a thread of its own, for several users at once."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pos2d import runtime
from pos2d.errors import InputError, UsageError
from pos2d.layout import build_layout
from pos2d.runtime.engine.prompt_scores import score_tokens
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.serving.engine import Engine
from pos2d.runtime.serving.jobs import BusyError, Job
from pos2d.runtime.serving.preload import preload
from pos2d.runtime.serving.streams import Stream
from pos2d.runtime.text.completions import Completion, Event, collect
from pos2d.runtime.text.options import request_options
from pos2d.runtime.text.requests import prepare_request

LONG = 400


@pytest.fixture
def engine(talker: runtime.Model) -> Iterator[Engine]:
    engine = Engine(talker, branches=16, max_waiting=4)
    yield engine
    engine.close()
    assert not engine.is_alive


def job_of(model: runtime.Model, prompts: list[str], context: str | None = None, **options: object) -> Job:
    request = prepare_request(model, prompts, context, request_options(model.path, options))
    count = len(prompts)
    return Job(request.layouts[0], (request.sampling,) * count, tuple((k,) for k in range(count)))


async def submit(engine: Engine, job: Job) -> Stream:
    return await engine.submit(engine.prepare(job))


async def read(stream: Stream) -> list[Event]:
    return [event async for events in stream for event in events]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_users_get_what_they_get_alone(talker: runtime.Model, engine: Engine) -> None:
    asked = [([f"question {k}", "and another"][: 1 + k % 2], [None, "a context for both"][k % 2]) for k in range(8)]

    async def all_of_them() -> list[list[Completion]]:
        async def one(prompts: list[str], context: str | None) -> list[Completion]:
            stream = await engine.submit(
                engine.prepare(job_of(talker, prompts, context, max_new_tokens=12, temperature=1.0))
            )
            return collect(await read(stream), prompts)

        return await asyncio.gather(*(one(*request) for request in asked))

    for (prompts, context), found in zip(asked, asyncio.run(all_of_them()), strict=True):
        assert found == talker.generate(prompts, context, max_new_tokens=12, temperature=1.0)
    load = engine.load()
    assert (load.running, load.waiting, load.branches, load.kv_tokens) == (0, 0, 0, 0)


def test_a_cancelled_branch_ends_and_the_others_go_on(talker: runtime.Model, engine: Engine) -> None:
    async def ask() -> list[Event]:
        events: list[Event] = []
        stream = await submit(engine, job_of(talker, ["a", "b", "c"], max_new_tokens=30))
        async for step in stream:
            events += step
            if len(events) == 9:
                stream.cancel(1)
        return events

    completions = collect(asyncio.run(ask()), ["a", "b", "c"])
    assert [completion.finish_reason for completion in completions] == ["length", "cancelled", "length"]
    assert len(completions[0].token_ids) == 30 > len(completions[1].token_ids) >= 3


def test_a_cancelled_job_ends_wherever_it_is(talker: runtime.Model, engine: Engine) -> None:
    """Before its first step, while its prompt is read, and while it writes."""

    async def ask(steps: int) -> list[Event]:
        stream = await submit(engine, job_of(talker, ["word " * 40, "b"], max_new_tokens=LONG))
        events: list[Event] = []
        if not steps:
            stream.cancel()
        async for step in stream:
            events += step
            steps -= 1
            if steps == 0:
                stream.cancel()
                stream.cancel()
        return events

    for steps in (0, 1, 5):
        events = asyncio.run(ask(steps))
        assert [event.finish_reason for event in events[-2:]] == ["cancelled", "cancelled"]
        assert len(events) < 60
    assert engine.load().kv_tokens == 0


def test_a_scored_prompt_has_what_the_model_gives_its_tokens(talker: runtime.Model, engine: Engine) -> None:
    text = "the wind is strong " * 20
    job = job_of(talker, [text], ignore_chat_template=True, max_new_tokens=1, top_logprobs=2)

    async def ask() -> Stream:
        stream = await submit(engine, replace(job, scores_prompt=True))
        await read(stream)
        return stream

    scores = asyncio.run(ask()).prompt_scores
    assert scores is not None
    ids = job.layout.ids
    expected = score_tokens(talker.logits(ids)[0, :-1], ids[1:].tolist(), top=2)
    assert scores.logprobs[0] is None
    np.testing.assert_allclose(scores.logprobs[1:], expected.logprobs, atol=1e-4)  # type: ignore[arg-type]
    assert [[token for token, _ in best] for best in scores.top[1:]] == [
        [token for token, _ in best] for best in expected.top
    ]
    assert len(scores.logprobs) == len(scores.top) == len(ids)


def test_a_document_that_is_read_first_stays(talking: Path, tmp_path: Path) -> None:
    """Whatever else is asked; its file spares the next start reading it."""
    document = "The market opens at eight. " * 4
    files = tmp_path / "contexts"
    for read_again in (True, False):
        model = runtime.load(talking / "onnx")
        engine = Engine(model, kv_budget=600)
        forward, passes = type(model.backend).forward, [0]

        def counting(self: Any, ids: Any, *rest: Any, passes: list[int] = passes, forward: Any = forward) -> Any:
            passes[0] += ids.size
            return forward(self, ids, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.backend), "forward", counting)
            tokens = preload(engine, document, str(files))
        assert (passes[0] >= tokens) == read_again

        async def ask(context: str, engine: Engine = engine, model: runtime.Model = model) -> int:
            stream = await submit(engine, job_of(model, ["When?"], context, max_new_tokens=4))
            await read(stream)
            return stream.cached_tokens

        for k in range(4):
            asyncio.run(ask(f"{k} is another document. " * 8))
        assert asyncio.run(ask(document)) >= tokens - 2
        engine.close()
    with pytest.raises(InputError, match="twice as many"):
        preload(Engine(model, kv_budget=100), document, None)


def test_too_many_wait_and_what_never_fits_is_refused_at_once(talker: runtime.Model, engine: Engine) -> None:
    async def ask() -> None:
        with pytest.raises(InputError, match="at most 16 run at once"):
            engine.prepare(Job(build_layout([[1]] * 17, talker.manifest.rope_2d), (Sampling(),) * 17, ((0,),) * 17))
        streams = []
        for _ in range(6):  # two of them run
            engine.check_room()
            streams.append(await submit(engine, job_of(talker, ["q"] * 8, max_new_tokens=LONG)))
        with pytest.raises(BusyError, match="4 requests are waiting") as refused:
            await submit(engine, job_of(talker, ["q"] * 8, max_new_tokens=LONG))
        assert 1 <= refused.value.retry_after <= 60
        with pytest.raises(BusyError) as early:
            engine.check_room()
        assert str(early.value) == str(refused.value)
        # Of one moment: where two jobs run, one of them may have ended a moment later, and a branch at any time.
        await until(lambda: (load := engine.load()).running == 2 and 8 < load.branches <= 16)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*map(read, streams))

    asyncio.run(ask())


def test_an_error_of_one_step_ends_the_jobs_of_that_step_alone(
    talker: runtime.Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> Completion:
        stream = await submit(engine, job_of(talker, ["a"], max_new_tokens=5))
        return collect(await read(stream), ["a"])[0]

    expected = asyncio.run(ask())
    forward = type(talker.backend).forward
    with monkeypatch.context() as patch:
        patch.setattr(type(talker.backend), "forward", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(ask())
    assert type(talker.backend).forward is forward
    assert asyncio.run(ask()) == expected


def test_a_defect_of_the_engine_reaches_all_its_users(talker: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(talker)

    async def ask() -> None:
        jobs = [engine.prepare(job_of(talker, ["a"], max_new_tokens=LONG)) for _ in range(3)]
        streams = [await engine.submit(job) for job in jobs[:2]]
        monkeypatch.setattr(engine._scheduler, "step", lambda: 1 / 0)
        for stream in streams:
            with pytest.raises(ZeroDivisionError):
                await read(stream)
        with pytest.raises(ZeroDivisionError):
            await engine.submit(jobs[2])

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    asyncio.run(ask())
    engine.close()
    assert not engine.is_alive


def test_closing_finishes_what_was_accepted(talker: runtime.Model) -> None:
    engine = Engine(talker)

    async def ask() -> list[Event]:
        stream = await submit(engine, job_of(talker, ["a"], max_new_tokens=40))
        closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
        events = await read(stream)
        await closing
        return events

    assert len(asyncio.run(ask())) >= 1
    assert not engine.is_alive


def test_a_closing_engine_can_be_told_to_stop_and_takes_no_more(talker: runtime.Model) -> None:
    engine = Engine(talker)

    async def ask() -> list[Event]:
        stream = await submit(engine, job_of(talker, ["a"], max_new_tokens=LONG))
        closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
        await until(lambda: engine._closed)
        with pytest.raises(UsageError, match="closed"):
            await submit(engine, job_of(talker, ["a"]))
        stream.cancel()
        events = await read(stream)
        await closing
        return events

    assert asyncio.run(ask())[-1].finish_reason == "cancelled"


def test_jobs_of_an_event_loop_that_was_closed_end(talker: runtime.Model, engine: Engine) -> None:
    async def ask() -> None:
        await submit(engine, job_of(talker, ["a"] * 8, max_new_tokens=LONG))

    async def another() -> list[Event]:
        return await read(await submit(engine, job_of(talker, ["a"] * 16, max_new_tokens=2)))

    steps = []
    step = engine._scheduler.step
    engine._scheduler.step = lambda: steps.append(1) or step()  # type: ignore[func-returns-value, method-assign]
    asyncio.run(ask())
    assert len(asyncio.run(another())) == 32
    assert len(steps) < LONG / 2


def test_an_answer_whose_text_cannot_be_made_fails_alone(
    talker: runtime.Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> tuple[list[Event], Stream]:
        jobs = [engine.prepare(job_of(talker, [text], max_new_tokens=20)) for text in ("a", "b")]
        monkeypatch.setattr(jobs[1].events, "of", lambda column: 1 / 0)
        streams = [await engine.submit(job) for job in jobs]
        return await read(streams[0]), streams[1]

    events, failed = asyncio.run(ask())
    assert len(events) == 20
    with pytest.raises(ZeroDivisionError):
        asyncio.run(read(failed))
    assert engine.load().kv_tokens == 0
