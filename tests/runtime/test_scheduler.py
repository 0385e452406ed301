"""The scheduler: what a request gets depends neither on its company nor on when it comes, and it leaves nothing."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
import pytest
import torch

from pos2d import runtime
from pos2d.errors import InputError
from pos2d.layout import Layout, build_continuations, build_layout
from pos2d.runtime.backends.onnx import rows as onnx_rows
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import decode, forward_slots
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import Column, SequenceState
from pos2d.runtime.engine.single_rows import SingleRows
from pos2d.runtime.scheduling.members import Group, new_member
from pos2d.runtime.scheduling.pace import MeasuredPieces, Pace, WholeChunks
from pos2d.runtime.scheduling.prefixes import PrefixStore, plain_length, shared_length
from pos2d.runtime.scheduling.scheduler import Limits, Scheduler
from tests.bounds import logits_bound
from tests.conftest import BACKENDS, Golden

ModelOf = Callable[..., runtime.Model]
ROOM = Limits(branches=64, kv_tokens=100_000, kept_tokens=100_000)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request of a test, and the step at which it comes."""

    layout: Layout
    new_tokens: tuple[int, ...]
    comes_at: int
    temperature: float = 0.0

    def sequence(self, model: runtime.Model) -> SequenceState:
        samplers = [
            Sampler(Sampling(max_new_tokens=tokens, temperature=self.temperature, seed=5, logprobs=True), (k,))
            for k, tokens in enumerate(self.new_tokens)
        ]
        return SequenceState(self.layout, samplers, model.manifest.context_length)

    def alone(self, model: runtime.Model) -> list[Column]:
        sequence = self.sequence(model)
        return list(
            decode(model.backend, self.layout, sequence._samplers, context_length=model.manifest.context_length)
        )


def requests(model: runtime.Model, count: int, seed: int = 0) -> list[Asked]:
    """Requests of all forms, of which many begin with the same tokens, and which come at different steps."""
    random = np.random.default_rng(seed)
    spec, vocabulary = model.manifest.rope_2d, model.manifest.vocab_size
    document = random.integers(1, vocabulary, 40).tolist()
    asked = []
    for number in range(count):
        branches = int(random.choice([1, 1, 1, 2, 5]))
        prompts = [random.integers(1, vocabulary, random.integers(1, 9)).tolist() for _ in range(branches)]
        context = [None, document, [*document[: int(random.integers(3, 40))], 7]][number % 3]
        layout = build_layout(prompts, spec, context, ("isolated", "columnar")[int(random.integers(2))])
        tokens = tuple(int(n) for n in random.integers(1, 14, branches))
        asked.append(Asked(layout, tokens, int(random.integers(12)), float(number % 2)))
    return asked


@dataclass(slots=True)
class Run:
    """What a scheduler gave for each request."""

    columns: dict[int, list[Column]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    steps: int = 0


def run(scheduler: Scheduler, model: runtime.Model, asked: Sequence[Asked]) -> Run:
    """Add every request at its step, and run until all have ended."""
    found, numbers = Run(), dict[int, int]()
    while len(numbers) < len(asked) or not scheduler.is_idle:
        for index, request in enumerate(asked):
            if index not in numbers.values() and request.comes_at <= found.steps:
                numbers[scheduler.add(request.sequence(model))] = index
        for progress in scheduler.step():
            index = numbers[progress.number]
            found.cached[index] = progress.cached_tokens
            if progress.error is not None:
                found.errors[index] = progress.error
            if progress.column is not None:
                found.columns.setdefault(index, []).append(progress.column)
        found.steps += 1
    return found


def same(found: Sequence[Column], expected: Sequence[Column]) -> bool:
    """Whether the tokens and ends are equal, and the log probabilities equal but for rounding."""
    return [(c.tokens, c.finished) for c in found] == [(c.tokens, c.finished) for c in expected] and all(
        a == b or (a is not None and b is not None and abs(a - b) < 1e-3)
        for one, two in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs, two.logprobs, strict=True)
    )


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("pace", [WholeChunks(3), WholeChunks(512), MeasuredPieces(64)], ids=["3", "512", "measured"])
def test_every_request_gets_what_it_gets_alone(golden: Golden, kind: str, pace: Pace, model_of: ModelOf) -> None:
    model = model_of(golden, kind, device="cpu", dtype="float32")
    asked = requests(model, 16)
    scheduler = Scheduler(model.backend, ROOM, pace, keeps_prompts=True)
    found = run(scheduler, model, asked)
    for index, request in enumerate(asked):
        assert same(found.columns[index], request.alone(model)), index
    assert sum(found.cached.values()) > 40
    assert scheduler.is_idle
    assert scheduler.kv_tokens == 0


def test_a_context_is_read_once(qwen2: Golden, model_of: ModelOf) -> None:
    """By requests that come together, by later ones, and not by those that begin otherwise."""
    model = model_of(qwen2, "onnx")
    document = list(range(1, 31))
    layouts = [build_layout([[40 + k]], model.manifest.rope_2d, document) for k in range(3)]
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(8))
    together = run(scheduler, model, [Asked(layout, (3,), 0) for layout in layouts])
    assert sorted(together.cached.values()) == [0, 30, 30]
    later = run(scheduler, model, [Asked(layouts[0], (3,), 0)])
    assert later.cached == {0: 30}
    assert same(later.columns[0], together.columns[0])
    other = build_layout([[40]], model.manifest.rope_2d, [document[0] + 1, *document[1:]])
    assert run(scheduler, model, [Asked(other, (3,), 0)]).cached == {0: 0}
    shorter = build_layout([[40]], model.manifest.rope_2d, document[:12])
    assert run(scheduler, model, [Asked(shorter, (3,), 0)]).cached == {0: 12}


def test_several_answers_of_one_prompt_find_it_in_the_cache(qwen2: Golden, model_of: ModelOf) -> None:
    """All of it but the last token of every answer, whose logits are needed."""
    model = model_of(qwen2, "onnx")
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(8), keeps_prompts=True)
    prompt = list(range(1, 31))
    found = []
    for answers in (3, 1, 2):
        layout = build_continuations(prompt, answers, model.manifest.rope_2d)
        asked = Asked(layout, (4,) * answers, 0)
        result = run(scheduler, model, [asked])
        assert same(result.columns[0], asked.alone(model))
        found.append(result.cached[0])
    assert found == [0, 29, 29]


def test_what_was_written_is_not_read_again_in_the_next_turn(qwen2: Golden, model_of: ModelOf) -> None:
    model = model_of(qwen2, "onnx")
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(8), keeps_prompts=True)
    prompt = list(range(1, 21))
    first = run(scheduler, model, [Asked(build_layout([prompt], model.manifest.rope_2d), (6,), 0)])
    answer = [token for column in first.columns[0] for token in column.tokens if token is not None]
    turn = build_layout([[*prompt, *answer[:-1], 9, 9]], model.manifest.rope_2d)
    assert run(scheduler, model, [Asked(turn, (2,), 0)]).cached == {0: 25}


def test_nobody_waits_while_a_long_prompt_is_read(qwen2: Golden, model_of: ModelOf) -> None:
    model = model_of(qwen2, "onnx")
    spec = model.manifest.rope_2d
    writer = Asked(build_layout([[5, 6]], spec), (12,), 0)
    newcomer = Asked(build_layout([list(range(1, 41))], spec), (2,), 3)
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(4))
    numbers = {scheduler.add(writer.sequence(model)): "writer"}
    order: list[list[str]] = []
    while not scheduler.is_idle:
        if len(order) == 3:
            numbers[scheduler.add(newcomer.sequence(model))] = "newcomer"
        order.append([numbers[progress.number] for progress in scheduler.step()])
    writing = [index for index, names in enumerate(order) if "writer" in names]
    assert max(np.diff(writing)) == 2  # at most one piece of the other prompt between two tokens
    assert order[-1] == ["newcomer"]


def test_the_budget_decides_who_is_admitted(qwen2: Golden, model_of: ModelOf) -> None:
    model = model_of(qwen2, "onnx")
    layout = build_layout([[1, 2, 3], [4, 5]], model.manifest.rope_2d)
    request = Asked(layout, (4, 4), 0)
    tokens = request.sequence(model).capacity
    for limits, most in (
        (Limits(64, 2 * tokens, 2 * tokens), 2),
        (Limits(3, 10 * tokens, 10 * tokens), 1),
        (Limits(4, 3 * tokens - 1, 3 * tokens - 1), 2),
    ):
        scheduler = Scheduler(model.backend, limits, WholeChunks(8))
        for _ in range(4):
            scheduler.add(request.sequence(model))
        running = []
        while not scheduler.is_idle:
            scheduler.step()
            running.append(len(scheduler.running))
            assert scheduler.kv_tokens + scheduler.store.tokens <= limits.kv_tokens
        assert max(running) == most
    with pytest.raises(InputError, match="room for"):
        Scheduler(model.backend, Limits(64, tokens - 1, tokens - 1), WholeChunks(8)).add(request.sequence(model))
    with pytest.raises(InputError, match="2 branches"):
        Scheduler(model.backend, Limits(1, 1000, 1000), WholeChunks(8)).add(request.sequence(model))


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_cancelled_branch_leaves_the_others_as_a_pass_over_all_tokens_has_them(
    qwen2: Golden, kind: str, visibility: Literal["columnar", "isolated"], model_of: ModelOf
) -> None:
    """The tokens that it fed stay visible; its newest one, which was not fed, does not exist."""
    model = model_of(qwen2, kind, device="cpu", dtype="float32")
    spec = model.manifest.rope_2d
    layout = build_layout([[1, 2], [3, 4], [5, 6]], spec, visibility=visibility)
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(8))
    sequence = Asked(layout, (8, 8, 8), 0).sequence(model)
    number, seen = scheduler.add(sequence), list[Floats]()
    choose = sequence.step

    def noted(logits: Floats) -> Column:
        seen.append(logits)
        return choose(logits)

    sequence.step = noted  # type: ignore[method-assign]
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(number, 1)
    assert sequence.live == [0, 2]
    fed = sequence.layout
    scheduler.step()
    cache = model.backend.new_cache(len(fed))
    for start, stop in ((0, 6), (6, 9), (9, 12), (12, 14)):
        expected = forward_slots(model.backend, fed, start, stop, cache)
    np.testing.assert_allclose(seen[-1], expected, atol=logits_bound(expected))
    scheduler.cancel(number, 0)
    scheduler.cancel(number, 2)
    assert scheduler.is_idle


def test_cancelled_requests_leave_nothing(qwen2: Golden, model_of: ModelOf) -> None:
    """Waiting, in the middle of the prompt, and while they write; the others get what they get alone."""
    model = model_of(qwen2, "onnx")
    asked = requests(model, 9, seed=1)
    for steps in range(12):
        scheduler = Scheduler(model.backend, Limits(12, 100_000, 100_000), WholeChunks(5))
        numbers = [scheduler.add(request.sequence(model)) for request in asked]
        columns: dict[int, list[Column]] = {number: [] for number in numbers}
        for step in range(400):
            if step == steps:
                for number in numbers[1::2]:
                    scheduler.cancel(number)
            for progress in scheduler.step():
                assert progress.column is not None
                columns[progress.number].append(progress.column)
        assert scheduler.is_idle
        assert scheduler.kv_tokens == 0
        assert all(same(columns[number], asked[index].alone(model)) for index, number in list(enumerate(numbers))[::2])


@pytest.mark.parametrize("error", [InputError("the logits are not finite"), ValueError("a defect of a library")])
def test_a_request_that_fails_fails_alone(qwen2: Golden, error: Exception, model_of: ModelOf) -> None:
    model = model_of(qwen2, "onnx")
    asked = [Asked(build_layout([[k + 1]], model.manifest.rope_2d), (5,), 0) for k in range(3)]
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(8))
    sequences = [request.sequence(model) for request in asked]

    def fail(logits: Floats) -> Column:
        raise error

    sequences[1].step = fail  # type: ignore[method-assign]
    numbers = [scheduler.add(sequence) for sequence in sequences]
    results = [progress for _ in range(20) for progress in scheduler.step()]
    assert [progress.number for progress in results if progress.error is not None] == [numbers[1]]
    for number, request in ((numbers[0], asked[0]), (numbers[2], asked[2])):
        assert same([p.column for p in results if p.number == number and p.column], request.alone(model))


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("method", ["add", "put", "take", "swap"])
def test_what_has_no_memory_fails_alone(
    qwen2: Golden, kind: str, method: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sequences are admitted, copied from each other, exchanged, or kept."""
    model = model_of(qwen2, kind, device="cpu", dtype="float32")
    asked = requests(model, 12, seed=4)
    rows = type(model.backend.new_rows())
    work, calls = getattr(rows, method), count(1)

    def sometimes(*arguments: Any) -> Any:
        if next(calls) % 3 == 0:
            raise MemoryError
        return work(*arguments)

    monkeypatch.setattr(rows, method, sometimes)
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(16), keeps_prompts=True)
    found = run(scheduler, model, asked)
    assert next(calls) > 3
    assert scheduler.is_idle
    assert scheduler.kv_tokens == 0
    assert all(isinstance(error, MemoryError) for error in found.errors.values())
    assert 0 < len(set(range(12)) - set(found.errors)) < 12 or method == "take"
    for index in set(range(12)) - set(found.errors):
        assert same(found.columns[index], asked[index].alone(model)), index


def test_scored_prompts_get_the_logits_of_every_token(qwen2: Golden, model_of: ModelOf) -> None:
    model = model_of(qwen2, "onnx")
    layout = build_layout([list(range(1, 24))], model.manifest.rope_2d)
    scheduler = Scheduler(model.backend, ROOM, WholeChunks(7), keeps_prompts=True)
    expected = forward_slots(model.backend, layout, 0, len(layout), None)
    for _ in range(2):  # also when the cache has the prompt
        pieces: list[tuple[int, Floats]] = []
        sequence = Asked(layout, (2,), 0).sequence(model)
        scheduler.add(sequence, lambda start, rows, pieces=pieces: pieces.append((start, rows)))  # type: ignore[misc]
        while not scheduler.is_idle:
            scheduler.step()
        assert [start for start, _ in pieces] == [0, 7, 14, 21]
        np.testing.assert_allclose(np.concatenate([rows for _, rows in pieces]), expected, atol=logits_bound(expected))


def test_only_tokens_at_the_places_of_ordinary_text_are_shared(qwen2: Golden, model_of: ModelOf) -> None:
    spec = model_of(qwen2, "onnx").manifest.rope_2d
    assert plain_length(build_layout([[1, 2, 3]], spec)) == 3
    assert plain_length(build_layout([[1, 2], [3]], spec, [5, 6, 7])) == 3
    assert plain_length(build_layout([[1, 2], [3, 4]], spec)) == 1
    assert shared_length(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2


def test_the_store_drops_what_was_used_least_recently() -> None:
    store = PrefixStore(25)
    texts = [np.arange(10) + 100 * k for k in range(3)]
    for ids in texts[:2]:
        store.add(ids, {"layer.0.key": np.zeros((1, 10, 1)), "layer.0.value": np.zeros((1, 10, 1))})
    assert store.find(np.append(texts[0], 7))[0] == 10
    store.add(texts[2], {})
    assert (store.tokens, store.holds(texts[0]), store.holds(texts[1])) == (20, True, False)
    store.add(np.append(texts[0], [1, 2]), {})  # the shorter one is part of it
    assert store.tokens == 22
    store.shrink(0)
    assert store.tokens == 0


def test_rows_keep_their_contents_when_others_come_and_go(golden: Golden, model_of: ModelOf) -> None:
    """Of both backends, also when the buffers grow and shrink."""
    random = np.random.default_rng(2)
    for kind in BACKENDS:
        model = model_of(golden, kind, device="cpu", dtype="float32")
        backend, layout = model.backend, build_layout([list(range(1, 6))], model.manifest.rope_2d)
        cache = backend.new_rows()
        cache.add()
        backend.forward(
            layout.ids[None], layout.positions[None], layout.pos2d[None], layout.mask()[None], cache.rows(0, 1)
        )
        pattern = cache.take(0, 5)
        kept: list[int] = [5]

        for _ in range(30):
            if random.integers(3) or len(kept) < 2:
                length = int(random.choice([1, 7, 300, 900]))
                cache.add()
                cache.put(len(kept), {name: as_kind(array, length) for name, array in pattern.items()})
                kept.append(length)
            else:
                row = int(random.integers(len(kept)))
                cache.move(len(kept) - 1, row)
                cache.pop()
                kept[row] = kept[-1]
                kept.pop()
            if len(kept) > 1:
                cache.swap(0, len(kept) - 1)
                kept[0], kept[-1] = kept[-1], kept[0]
            assert cache.lengths.tolist() == kept
            for row, length in enumerate(kept):
                if length != 5:
                    found = np.asarray(next(iter(cache.take(row, length).values())))
                    assert (found == length).all()


@pytest.mark.parametrize("kind", BACKENDS)
def test_rows_that_cannot_grow_stay_as_they_are(
    qwen2: Golden, kind: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = model_of(qwen2, kind, device="cpu", dtype="float32").backend
    cache = backend.new_rows()
    cache.add()
    layout = build_layout([[1, 2, 3]], model_of(qwen2, kind).manifest.rope_2d)
    backend.forward(layout.ids[None], layout.positions[None], layout.pos2d[None], layout.mask()[None], cache.rows(0, 1))
    before, capacity, calls = cache.take(0, 3), cache.capacity, count(1)
    library: Any = onnx_rows if kind == "onnx" else torch
    zeros = library.zeros

    def sometimes(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError
        return zeros(*arguments, **settings)

    monkeypatch.setattr(library, "zeros", sometimes)
    with pytest.raises(MemoryError):
        cache.reserve(1000)
    assert cache.capacity == capacity
    after = cache.take(0, 3)
    assert before.keys() == after.keys()
    assert all(np.array_equal(np.asarray(before[name]), np.asarray(after[name])) for name in before)
    cache.reserve(1000)
    assert cache.capacity >= 1000


def test_buffers_that_were_replaced_are_freed(qwen2: Golden, model_of: ModelOf) -> None:
    """Also those that a pass over other rows was bound to."""
    model = model_of(qwen2, "onnx")
    cache, layout = model.backend.new_rows(), build_layout([[1, 2, 3]], model.manifest.rope_2d)
    for _ in range(2):
        cache.add()
    for row in range(2):
        rows = cache.rows(row, row + 1)
        model.backend.forward(layout.ids[None], layout.positions[None], layout.pos2d[None], layout.mask()[None], rows)
    del rows
    replaced = [weakref.ref(buffer) for buffer in cache.buffers.values()]
    cache.reserve(1000)
    assert [buffer() for buffer in replaced] == [None] * len(replaced)


def as_kind(array: Any, length: int) -> Any:
    """An array of the library and the type of ``array``, ``[K, length, D]``, that is filled with its length."""
    shape = (array.shape[0], length, array.shape[2])
    if isinstance(array, np.ndarray):
        return np.full(shape, length, dtype=array.dtype)
    return array.new_full(shape, length)


def test_a_group_keeps_its_writers_in_front(qwen2: Golden, model_of: ModelOf) -> None:
    model = model_of(qwen2, "onnx")
    members = [
        new_member(k, Asked(build_layout([[k + 1]], model.manifest.rope_2d), (5,), 0).sequence(model), False)
        for k in range(5)
    ]
    group = Group(model.backend)
    for member in members:
        group.add(member)
    for member in (members[3], members[1]):
        group.start_writing(member)
    assert list(group.writers) == [members[3], members[1]]
    group.remove(members[3])
    assert list(group.writers) == [members[1]]
    group.remove(members[4])
    group.start_writing(members[0])
    assert list(group.writers) == [members[1], members[0]]
    assert len(group) == 3


def test_a_backend_that_takes_one_sequence_a_pass_gives_the_same(
    golden: Golden, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(golden, "onnx")
    monkeypatch.setattr(type(model.backend), "new_rows", lambda backend: SingleRows(backend.new_cache))
    asked = requests(model, 6, seed=3)
    found = run(Scheduler(model.backend, ROOM, WholeChunks(16)), model, asked)
    assert all(same(found.columns[index], request.alone(model)) for index, request in enumerate(asked))
