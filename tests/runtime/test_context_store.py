"""Contexts in files: the same answers, for nothing but what the file was made for, and whole or not at all."""

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pos2d import runtime
from pos2d.errors import InputError, Pos2DError, StorageError, UsageError
from pos2d.layout import build_layout
from pos2d.runtime.backends.onnx.backend import OnnxBackend
from pos2d.runtime.backends.torch.kv_cache import FixedCache
from pos2d.runtime.engine.decode import forward_slots
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.text.completions import collect
from pos2d.runtime.text.context_store import ContextStore
from pos2d.runtime.text.kv_file import DATA, _digest, read_kv, write_kv
from pos2d.runtime.text.options import request_options
from pos2d.runtime.text.requests import prepare_request, stream_events
from tests.bases import CONFIGS, write_base, write_tokenizer
from tests.conftest import BACKENDS, Golden

DOCUMENT = "The market opens at eight. Bread is sold by Anna, fish by Tom. " * 3
PROMPTS = ["When?", "Who sells fish?", "W"]
OPTIONS: Any = {"max_new_tokens": 6, "logprobs": True}
ModelOf = Callable[..., runtime.Model]


@pytest.fixture
def never_prefilled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a context that is computed is an error."""

    def computed(_prefix: PrefixCache, ids: Sequence[int]) -> None:
        raise AssertionError(f"{len(ids)} tokens were prefilled")

    return lambda: monkeypatch.setattr(PrefixCache, "fill_anew", computed)


@pytest.fixture(scope="module")
def stored(talking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the document, of the ONNX artifact."""
    path = tmp_path_factory.mktemp("stored") / "document.safetensors"
    runtime.load(talking / "onnx").generate(PROMPTS, DOCUMENT, cache_context=path, max_new_tokens=1)
    return path


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_answers_are_those_without_the_file(
    talker: runtime.Model, visibility: Any, tmp_path: Path, never_prefilled: Callable[[], None]
) -> None:
    """Bit for bit: the log probabilities of all tokens, too."""
    place = tmp_path / "new" / "document.safetensors"
    expected = talker.generate(PROMPTS, DOCUMENT, visibility=visibility, **OPTIONS)
    assert talker.generate(PROMPTS, DOCUMENT, visibility=visibility, cache_context=place, **OPTIONS) == expected
    never_prefilled()
    for max_branches in (None, 2):
        again = talker.generate(
            PROMPTS, DOCUMENT, visibility=visibility, cache_context=str(place), max_branches=max_branches, **OPTIONS
        )
        if max_branches is None or visibility == "isolated":
            assert [answer.token_ids for answer in again] == [answer.token_ids for answer in expected]
        if max_branches is None:
            assert again == expected
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_context_whose_last_tokens_a_prompt_takes(
    talker: runtime.Model, tmp_path: Path, never_prefilled: Callable[[], None]
) -> None:
    """The file has the tokens of the whole context, whatever the prompts are."""
    place = str(tmp_path / "document.safetensors")
    options = request_options(talker.path, {"cache_context": place, "max_new_tokens": 6})
    request = prepare_request(talker, PROMPTS, DOCUMENT, options)
    context = request.encoded.context or []
    whole = [*context, 7, 8]
    longer = replace(request, encoded=replace(request.encoded, whole_context=whole))

    def tokens(asked: Any) -> list[tuple[int, ...]]:
        return [answer.token_ids for answer in collect(stream_events(talker, asked), PROMPTS)]

    expected = tokens(replace(request, cache_context=None))
    assert tokens(longer) == expected
    never_prefilled()
    assert tokens(longer) == expected
    with safe_open(place, "np") as file:
        assert file.metadata()["ids"].startswith(f"{len(whole)} tokens")


@pytest.mark.parametrize("kind", [*BACKENDS, "fixed"])
def test_what_one_cache_gives_another_takes(
    golden: Golden, kind: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(golden, "merged" if kind == "fixed" else kind, device="cpu", dtype="float32")
    if kind == "fixed":
        monkeypatch.setattr(model.backend, "new_cache", FixedCache)
    spec, vocab = model.manifest.rope_2d, model.manifest.vocab_size
    ids = np.arange(240) * 7 % vocab
    layout = build_layout([ids[90:130].tolist(), ids[200:].tolist()], spec, ids[:70].tolist())
    first, other, fresh = (PrefixCache(model.backend, spec, 512) for _ in range(3))
    for prefix in (first, other):  # attention over a fixed size sums what is masked, too
        prefix.cache.reserve(256)
    first.fill(layout.ids[:70].tolist())
    arrays = first.cache.take(70)
    assert {name: tuple(array.shape) for name, array in arrays.items()} == model.backend.kv_format.shapes(70)
    assert first.cache.take(9)["layer.1.value"].shape[1] == 9
    other.fill(ids[100:190].tolist())  # other tokens were there before
    other.cache.put(arrays)
    expected = forward_slots(model.backend, layout, 70, len(layout), first.cache)
    found = forward_slots(model.backend, layout, 70, len(layout), other.cache)
    np.testing.assert_array_equal(found, expected)
    fresh.put(layout.ids[:70].tolist(), arrays)
    for cache in (other.cache, fresh.cache):  # what came after does not change them
        again = cache.take(70)
        assert all((again[name] == array).all() for name, array in arrays.items())


def test_bfloat16_comes_back_bit_for_bit(golden: Golden, model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of(golden, "merged", device="cpu", dtype="bfloat16")
    prefix = PrefixCache(model.backend, model.manifest.rope_2d, 512)
    store, ids = ContextStore(model, tmp_path), list(range(9, 60))
    store.fill(prefix, ids)
    arrays, found = prefix.cache.take(len(ids)), store.read(ids)
    assert found is not None
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], arrays[name]) for name in arrays)


def test_another_text_backend_or_model_is_refused_and_the_file_untouched(
    talking: Path, stored: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(stored, tmp_path))
    before = path.read_bytes()
    onnx, merged = (runtime.load(talking / kind) for kind in ("onnx", "merged"))

    def refusal(model: runtime.Model, document: str) -> str:
        with pytest.raises(InputError, match="is left as it is; delete it, or name another `cache_context`") as caught:
            model.generate(PROMPTS, document, cache_context=path, **OPTIONS)
        return str(caught.value)

    assert "keys and values of another context, and" in refusal(onnx, DOCUMENT + "!")
    assert "of another model and another backend or number type, and" in refusal(merged, DOCUMENT)
    retrained = replace(onnx, manifest=replace(onnx.manifest, files={"model.onnx.data": {"bytes": 1, "sha256": "0"}}))
    assert "of another model, and" in refusal(retrained, DOCUMENT)
    assert path.read_bytes() == before


def test_the_way_to_compute_belongs_to_it(talking: Path, tmp_path: Path) -> None:
    single, half = (runtime.load(talking / "merged", dtype=dtype) for dtype in ("float32", "bfloat16"))
    eager = runtime.load(talking / "merged", dtype="float32", attn_implementation="eager")
    quantised = runtime.load(talking / "merged", dtype="float32", quant="8bit")
    place = tmp_path / "document.safetensors"
    single.generate(PROMPTS, DOCUMENT, cache_context=place, **OPTIONS)
    for model in (half, eager, quantised):
        with pytest.raises(InputError, match="of another backend or number type, and"):
            model.generate(PROMPTS, DOCUMENT, cache_context=place, **OPTIONS)


def test_a_plain_model_is_recognised_by_its_bytes(tmp_path: Path) -> None:
    """Also where two models have equal sizes and times, as in archives that set them."""
    models = []
    for seed in (0, 1):
        base = write_base(tmp_path / str(seed) / "base", CONFIGS["llama"], seed=seed)
        write_tokenizer(base)
        for file in base.iterdir():
            os.utime(file, (0, 0))
        models.append(runtime.load(base))
    first, other = models
    place = tmp_path / "document.safetensors"
    first.generate("When?", DOCUMENT, cache_context=place, **OPTIONS)
    assert runtime.load(first.path).identity == first.identity
    with pytest.raises(InputError, match="of another model, and"):
        other.generate("When?", DOCUMENT, cache_context=place, **OPTIONS)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], *, hashed: bool = True) -> None:
    """Write the file with other arrays and a hash that fits them, as somebody would who wants to be believed."""
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        facts = file.metadata()
    change(arrays)
    save_file(arrays, path, {**facts, DATA: _digest(arrays)} if hashed else facts)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def poison(arrays: dict[str, Any]) -> None:
    arrays["layer.1.key"][1, 5, 3] = np.nan


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of the last value": lambda path: flip(path, -2),
    "a bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 4),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0\0"),
    "not a number": lambda path: rewritten(path, poison),
    "other values": lambda path: rewritten(path, lambda a: a.update({"layer.0.key": -a["layer.0.key"]}), hashed=False),
    "a tensor missing": lambda path: rewritten(path, lambda arrays: arrays.pop("layer.1.value")),
    "a tensor more": lambda path: rewritten(path, lambda a: a.update({"layer.2.key": a["layer.0.key"]})),
    "fewer tokens": lambda path: rewritten(path, lambda a: a.update({n: v[:, 1:].copy() for n, v in a.items()})),
    "half": lambda path: rewritten(path, lambda a: a.update({n: v.astype(np.float16) for n, v in a.items()})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_before_any_value_is_used(damage: str, talking: Path, stored: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(stored, tmp_path))
    DAMAGES[damage](path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"is damaged \(.+\); delete it, and it is written again"):
        runtime.load(talking / "onnx").generate(PROMPTS, DOCUMENT, cache_context=path, **OPTIONS)
    assert path.read_bytes() == before


def test_other_files_are_no_caches(talking: Path, tmp_path: Path) -> None:
    model = runtime.load(talking / "onnx")
    weights = tmp_path / "model.safetensors"
    save_file({"weight": np.ones(3)}, weights)
    text = tmp_path / "notes.txt"
    text.write_text("notes")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for place, message in (
        (weights, "is no cache of a context"),
        (text, "is no directory, and no file whose name ends in .safetensors"),
        (pipe, "is not a regular file"),
        ("", "is no path"),
    ):
        with pytest.raises(UsageError, match=message):
            model.generate(PROMPTS, DOCUMENT, cache_context=place, **OPTIONS)
    with pytest.raises(UsageError, match="`cache_context` stores a `context`, and there is none"):
        model.generate(PROMPTS, cache_context=tmp_path, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.txt", "pipe.safetensors"]


def test_a_directory_takes_every_context_and_model(
    talking: Path, tmp_path: Path, never_prefilled: Callable[[], None]
) -> None:
    models = [runtime.load(talking / kind) for kind in BACKENDS]
    place = tmp_path / "new" / "contexts"
    asked = [(model, text) for model in models for text in (DOCUMENT, "Another one. ")]
    expected = [model.generate(PROMPTS, text, cache_context=place, **OPTIONS) for model, text in asked]
    assert len(list(place.iterdir())) == 4
    never_prefilled()
    assert [model.generate(PROMPTS, text, cache_context=place, **OPTIONS) for model, text in asked] == expected


def test_a_conversation_starts_from_its_file(
    talker: runtime.Model, tmp_path: Path, never_prefilled: Callable[[], None]
) -> None:
    system = [{"role": "system", "content": DOCUMENT}]

    def answers(**options: Any) -> tuple[list[str], int]:
        conversation = talker.conversation(system, max_new_tokens=5, **options)
        texts = ["".join(event.text for event in conversation.ask(question)) for question in PROMPTS]
        return texts, conversation.prefilled_tokens

    expected, all_tokens = answers()
    assert answers(cache_context=tmp_path) == (expected, all_tokens)
    never_prefilled()
    texts, tokens = answers(cache_context=tmp_path)
    assert texts == expected
    assert tokens < all_tokens - len(DOCUMENT)
    with pytest.raises(UsageError, match="there is none"):
        talker.conversation(cache_context=tmp_path)


def test_the_commands(call: Callable[..., Result], talking: Path, tmp_path: Path) -> None:
    """Exit codes, and nothing in a directory that cannot be written."""
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT)
    run = ("run", talking / "onnx", "-p", "When?", "-n", 3, "--json", "--cache-context")
    cached = []
    for _ in range(2):
        result = call(*run, tmp_path / "kv", "--context", f"@{document}")
        cached.append(json.loads(result.stdout)["cached_tokens"])
    assert cached[0] == 0
    assert cached[1] > len(DOCUMENT)
    assert call(*run, tmp_path / "kv").exit_code == 2
    chat = ("run", talking / "onnx", "--mode", "chat", "--cache-context", tmp_path / "kv")
    assert call(*chat).exit_code == 2
    blocked = call(*run, document / "kv.safetensors", "--context", f"@{document}")
    assert blocked.exit_code == 5
    assert "cannot be written" in blocked.stderr
    assert not blocked.stdout


def test_a_full_disk_is_an_error_before_the_first_token(talking: Path, tmp_path: Path) -> None:
    model = runtime.load(talking / "onnx")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written: .+; make room, name another `cache_context`"):
            next(iter(model.stream(PROMPTS, DOCUMENT, cache_context=tmp_path / "kv", **OPTIONS)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.parametrize("call_name", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_no_part_of_a_file(
    call_name: str, talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = runtime.load(talking / "onnx").backend.kv_format
    arrays = {name: np.ones(shape, dtype=np.float32) for name, shape in form.shapes(5).items()}
    path = tmp_path / "document.safetensors"
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, call_name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_kv(path, arrays, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not path.exists()
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    write_kv(path, arrays, {})
    write_kv(path, {name: array + 1 for name, array in arrays.items()}, {})  # a file that is there stays
    assert list(tmp_path.iterdir()) == [path]
    found = read_kv(path, form, 5, lambda _: None)
    assert all((found[name] == arrays[name]).all() for name in arrays)


def test_several_writers_at_once(talking: Path, tmp_path: Path) -> None:
    model = runtime.load(talking / "onnx")
    form = model.backend.kv_format
    arrays = {name: np.full(shape, 2.0, dtype=np.float32) for name, shape in form.shapes(40).items()}
    store, ids = ContextStore(model, tmp_path / "kv.safetensors"), list(range(40))
    faults: list[Pos2DError] = []

    def write() -> None:
        try:
            for _ in range(5):
                store.write(ids, arrays)
                store.read(ids)
        except Pos2DError as error:
            faults.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [path.name for path in tmp_path.iterdir()] == ["kv.safetensors"]


def test_batches_read_the_contexts_of_lines(
    talker: runtime.Model, tmp_path: Path, never_prefilled: Callable[[], None]
) -> None:
    lines = [
        {"prompt": "When?"},
        {"prompts": ["Who?", "What?"]},
        {"prompt": "Who?", "context": "Another one. "},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"prompt": "Where?"},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def output(name: str, **options: Any) -> bytes:
        path = tmp_path / name
        runtime.batch(talker.path, source, path, context=DOCUMENT, max_new_tokens=4, **options)
        return path.read_bytes()

    expected = output("without")
    assert output("first", cache_context=tmp_path / "kv") == expected
    assert len(list((tmp_path / "kv").iterdir())) == 2
    never_prefilled()
    assert output("second", cache_context=tmp_path / "kv") == expected
    with pytest.raises(UsageError, match="is one file, and there are several contexts; name a directory"):
        output("third", cache_context=tmp_path / "kv.safetensors")
    source.write_text(json.dumps(lines[3]) + "\n")
    with pytest.raises(UsageError, match="every line has messages or an error"):
        output("fourth", cache_context=tmp_path / "kv")
    assert not (tmp_path / "third").exists()


def test_a_batch_reads_contexts_with_one_graph_whichever_lines_came_before(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs round differently, and a run that continues in the second window has computed nothing before it."""
    fill, graphs = ContextStore.fill, list[int]()

    def noted(store: ContextStore, prefix: PrefixCache, ids: Sequence[int]) -> None:
        backend = store.artifact.backend
        assert isinstance(backend, OnnxBackend)
        graphs.append(max(backend.graphs._variant, backend.graphs._expected))
        fill(store, prefix, ids)

    monkeypatch.setattr(ContextStore, "fill", noted)
    lines = [{"prompt": "x"}] * 65
    lines[0] = lines[64] = {"context": DOCUMENT, "prompt": "y"}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runtime.batch(
        talking / "onnx",
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        cache_context=str(tmp_path / "kv"),
        max_new_tokens=1,
    )
    assert len(graphs) == 2
    assert len(set(graphs)) == 1
