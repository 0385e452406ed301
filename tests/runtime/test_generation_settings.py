"""generation_config.json: used as transformers' ``generate`` uses it, or named."""

import ast
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, GenerationConfig

from pos2d import exporter, runtime
from pos2d.errors import InputError, UsageError
from pos2d.runtime.engine.generation_settings import (
    NO_SETTINGS,
    OPTION_KEYS,
    READ_ELSEWHERE,
    READERS,
    STOP_KEY,
    UNUSED_KEYS,
    WITHOUT_EFFECT,
    read_settings,
)
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import generation_defaults, resolve_sampling
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
OLD_SOURCE = ROOT / ".venv/transformers-4.57/transformers/generation/configuration_utils.py"
TABLES = ((*OPTION_KEYS, STOP_KEY), READERS, READ_ELSEWHERE, WITHOUT_EFFECT, UNUSED_KEYS)
PROMPT = "near the sea"
SEPARATOR, END = 256, 257


def keys_of_transformers() -> set[str]:
    """The keys of the installed release, without what it computes."""
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def keys_of_old_transformers() -> dict[str, Any]:
    """The keys of 4.57 and their defaults, from its source."""
    source = OLD_SOURCE.read_text(encoding="utf-8").partition("def validate(")[0]
    found = re.findall(r'kwargs\.pop\("(\w+)", (.+?)\)\n', source)
    return {name: None if default == "__version__" else ast.literal_eval(default) for name, default in found}


def test_every_key_of_transformers_is_in_one_table() -> None:
    """A key of a new release has to be put into one before this passes again."""
    names = [name for table in TABLES for name in table]
    assert len(names) == len(set(names))
    assert keys_of_transformers() <= set(names)


@pytest.mark.skipif(not OLD_SOURCE.is_file(), reason="make test installs transformers 4.57 beside the newest")
def test_the_defaults_of_transformers_ask_for_nothing() -> None:
    old = keys_of_old_transformers()
    assert len(old) > 60
    assert set(old) <= {name for table in TABLES for name in table}
    for defaults in (old, dict.fromkeys(keys_of_transformers()), GenerationConfig._get_default_generation_params()):
        assert read_settings(defaults | {"max_length": None}) == NO_SETTINGS


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary model on torch; its greedy answers reach an end token now and then."""
    root = tmp_path_factory.mktemp("plain")
    base = write_base(root / "base", CONFIGS["llama"])
    write_tokenizer(base, special=("<|sep|>", "<|end|>"))
    lora = write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))
    (base / "generation_config.json").write_text('{"eos_token_id": [257, 94]}', encoding="utf-8")
    exporter.merge(base, lora, root / "merged", no_patch_rope=True)
    (root / "merged" / "generation_config.json").unlink()
    manifest = json.loads((root / "merged" / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["generation_config.json"]
    (root / "merged" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return root / "merged"


@pytest.fixture(scope="module")
def ours(plain: Path) -> runtime.Model:
    return runtime.load(plain)


@pytest.fixture(scope="module")
def theirs(plain: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True, attn_implementation="eager")


@pytest.fixture
def settings(plain: Path) -> Any:
    """Writes the settings of the artifact, which has none again afterwards."""
    path = plain / "generation_config.json"
    yield lambda **values: path.write_text(json.dumps(values), encoding="utf-8")
    path.unlink(missing_ok=True)


def by_transformers(theirs: Any, tokenizer: Any, prompt: str, values: dict[str, Any]) -> list[int]:
    """Its answer without the end token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ends = [257, 94]
    theirs.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=257, **values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths that contradict each other
        found: list[int] = theirs.generate(ids, tokenizer=tokenizer)[0, ids.shape[1] :].tolist()
    return found[:-1] if found and found[-1] in ends else found


def drawn_settings(draw: np.random.Generator, pool: list[int]) -> dict[str, Any]:
    """Some settings, with tokens that the model likes to write."""

    def tokens(count: int) -> list[int]:
        return [int(token) for token in draw.choice(pool, size=count)]

    every: dict[str, Callable[[], Any]] = {
        "max_length": lambda: int(draw.integers(13, 40)),
        "max_new_tokens": lambda: int(draw.integers(1, 25)),
        "min_length": lambda: int(draw.integers(0, 30)),
        "min_new_tokens": lambda: int(draw.integers(0, 12)),
        "suppress_tokens": lambda: [*tokens(2), 100_000, -1],
        "begin_suppress_tokens": lambda: tokens(3),
        "bad_words_ids": lambda: [tokens(1), tokens(2), tokens(3), [94]],
        "no_repeat_ngram_size": lambda: int(draw.integers(0, 4)),
        "encoder_no_repeat_ngram_size": lambda: int(draw.integers(0, 3)),
        "encoder_repetition_penalty": lambda: float(draw.uniform(0.5, 2)),
        "repetition_penalty": lambda: float(draw.uniform(0.7, 1.6)),
        "sequence_bias": lambda: [[tokens(1), 2.5], [tokens(2), -3.5], [[*tokens(1), 94], 4.0]],
        "forced_eos_token_id": lambda: [[94], 257][draw.integers(2)],
        "forced_bos_token_id": lambda: tokens(1)[0],
        "exponential_decay_length_penalty": lambda: [int(draw.integers(0, 6)), float(draw.uniform(1, 1.5))],
        "stop_strings": lambda: [chr(int(draw.integers(97, 123))), "e "],
    }
    chosen = draw.choice(list(every), size=int(draw.integers(1, 6)), replace=False)
    return {str(name): every[str(name)]() for name in chosen}


@pytest.mark.parametrize("seed", range(40))
def test_answers_are_those_of_generate(
    ours: runtime.Model, theirs: Any, settings: Callable[..., None], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    prompt = PROMPT if seed % 5 else "x"  # one token alone has rules of its own
    pool = ours.generate_ids([list(range(40, 50))], max_new_tokens=24, ignore_eos=True)[0]
    values = drawn_settings(draw, [*pool, 94])
    if not {"max_length", "max_new_tokens"} & set(values):
        values["max_new_tokens"] = 20
    settings(eos_token_id=[257, 94], **values)
    (answer,) = ours.generate(prompt)
    assert list(answer.token_ids) == by_transformers(theirs, ours.tokenizer, prompt, values), values


@pytest.mark.parametrize("seed", range(60))
def test_logits_pass_through_the_processors_of_generate(theirs: Any, tmp_path: Path, seed: int) -> None:
    """All of them in one list, in its order, also those that only sampling uses."""
    draw = np.random.default_rng(seed)
    narrowing: dict[str, Any] = {
        "top_h": 0.4,
        "typical_p": float(draw.uniform(0.2, 1)),
        "epsilon_cutoff": float(draw.uniform(0, 0.01)),
        "eta_cutoff": float(draw.uniform(0, 0.02)),
        "temperature": float(draw.uniform(0.5, 2)),
        "top_k": int(draw.integers(5, 200)),
        "top_p": float(draw.uniform(0.3, 1)),
        "min_p": float(draw.uniform(0.001, 0.1)),
    }
    chosen = [str(name) for name in draw.choice(list(narrowing), size=3, replace=False)]
    values = drawn_settings(draw, list(range(12))) | {name: narrowing[name] for name in chosen} | {"do_sample": True}
    for length in ("max_length", "stop_strings"):
        values.pop(length, None)
    prompt, answer = draw.integers(12, size=7).tolist(), draw.integers(12, size=int(draw.integers(0, 5))).tolist()
    logits = draw.normal(scale=3.0, size=300).astype(np.float32)

    config = GenerationConfig(eos_token_id=[257, 94], **({"top_k": 50} | values))
    theirs._prepare_special_tokens(config, device="cpu")
    config.max_length = len(prompt) + (config.max_new_tokens or 256)
    processors = theirs._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt]), device="cpu"
    )
    expected = processors(torch.tensor([[*prompt, *answer]]), torch.tensor(logits)[None])[0].numpy()

    (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    sampler = Sampler(resolve_sampling(tmp_path, {}), (0,), {257, 94}, prompt)
    for token in answer:
        sampler.add(token)
    found = sampler.processed(logits)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected), err_msg=str(values))
    kept = np.isfinite(found)
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompt", ["x", PROMPT])
def test_the_shortest_length_counts_the_prompt(
    ours: runtime.Model, theirs: Any, settings: Callable[..., None], prompt: str
) -> None:
    """An end token that is likelier than all others comes as soon as it may."""
    values: dict[str, Any] = {"sequence_bias": [[[94], 80.0]], "min_length": 15, "max_new_tokens": 20}
    settings(eos_token_id=[257, 94], **values)
    (answer,) = ours.generate(prompt)
    assert len(answer.token_ids) == 15 - len(prompt)
    assert list(answer.token_ids) == by_transformers(theirs, ours.tokenizer, prompt, values)


def test_branches_see_what_they_would_see_alone(ours: runtime.Model, settings: Callable[..., None]) -> None:
    """Lengths and n-grams count the tokens of the context, of the branch's own prompt and of its own answer."""
    settings(max_length=24, no_repeat_ngram_size=2, sequence_bias=[[[ord("e"), 5], 3.0]])
    prompts = ["one", "and two more"]
    together = ours.generate(prompts, "before ", visibility="isolated")
    assert together == [ours.generate(prompt, "before ", visibility="isolated")[0] for prompt in prompts]
    assert len(together[1].token_ids) == 24 - len("before and two more")


def test_the_callers_options_win(ours: runtime.Model, plain: Path, settings: Callable[..., None]) -> None:
    settings(max_length=14, min_length=20, stop_strings=["e"], suppress_tokens=[94])
    assert len(ours.generate(PROMPT, stop="zzzz")[0].token_ids) == 2
    assert len(ours.generate(PROMPT, max_new_tokens=5, stop="zzzz")[0].token_ids) == 5
    assert resolve_sampling(plain, {"min_new_tokens": 0}).generation.min_length == 0
    assert resolve_sampling(plain, {"stop": ["x"]}).stop == ("x",)
    with pytest.raises(
        InputError, match=r"max_length in .* is 14 tokens, and the prompt has 16; give `max_new_tokens`"
    ):
        ours.generate("x" * 16)


@pytest.mark.parametrize(
    "value",
    [{"num_beams": 4}, {"guidance_scale": 1.5}, {"token_healing": True}, {"max_time": 3.0}, {"temprature": 0.3}],
    ids=str,
)
def test_what_is_not_used_is_named_once(
    call: Call, ours: runtime.Model, plain: Path, settings: Callable[..., None], value: dict[str, Any]
) -> None:
    settings(max_new_tokens=2, early_stopping=True, length_penalty=2.0, use_cache=False, **value)
    ((name, number),) = value.items()
    shown = call("run", plain, "-p", "a", "--json").stderr
    assert shown == f"warning: {plain / 'generation_config.json'}: {name} {number!r} is not used\n"
    with pytest.warns(UserWarning, match=name) as heard:
        ours.generate("a")
    assert len(heard) == 1


@pytest.mark.parametrize("name", [*READERS, *OPTION_KEYS, "do_sample", "stop_strings"])
@pytest.mark.parametrize("value", ["many", {"a": 1}, [[[]]], -5], ids=str)
def test_values_of_another_kind_are_named(tmp_path: Path, name: str, value: Any) -> None:
    if name == STOP_KEY and isinstance(value, str):
        return
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, name: value}), encoding="utf-8")
    with pytest.raises(InputError, match=f"{re.escape(str(path))} cannot be used: {name} "):
        generation_defaults(tmp_path)


def test_a_file_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"max_new_tokens": 3}')
    assert resolve_sampling(tmp_path, {}).max_new_tokens == 3


def test_settings_that_leave_no_token_are_refused(ours: runtime.Model, settings: Callable[..., None]) -> None:
    settings(suppress_tokens=list(range(300)))
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="forbid every token"):
            ours.generate("a", temperature=temperature)
    settings(max_new_tokens=1, forced_eos_token_id=5000)
    with pytest.raises(InputError, match="force token 5000, the vocabulary has 300"):
        ours.generate("a")


def test_a_special_token_as_a_stop_text_ends_the_answer(ours: runtime.Model, settings: Callable[..., None]) -> None:
    """The text of an answer has none."""
    settings(sequence_bias=[[[SEPARATOR], 50.0]], begin_suppress_tokens=[SEPARATOR])
    for stop in ("<|sep|>", "<|sep|>\n"):
        (answer,) = ours.generate("a", stop=stop, max_new_tokens=5)
        assert answer.finish_reason == "stop"
        assert len(answer.token_ids) == 1
    settings(sequence_bias=[[[SEPARATOR], 50.0]], stop_strings=["<|sep|>"])
    assert ours.generate("a", max_new_tokens=5)[0].token_ids == ()
    with pytest.raises(
        UsageError, match=r"`stop` 'a<.sep.>', or stop_strings .* has the special token <.sep.>.*`end_token`"
    ):
        ours.generate("a", stop="a<|sep|>")


def test_end_tokens_outside_the_vocabulary_are_refused(ours: runtime.Model) -> None:
    given: Any
    for given in (-1, [3, 300], 2**40):
        with pytest.raises(UsageError, match="outside the vocabulary of 300"):
            ours.stream_ids([[1, 2]], eos_token_ids=given, min_new_tokens=1)
    given = "</s>"
    with pytest.raises(UsageError, match="are not token ids"):
        ours.stream_ids([[1, 2]], eos_token_ids=given)
    (free,) = ours.generate_ids([[1, 2]], max_new_tokens=4, ignore_eos=True)
    given = np.int64(free[-1])
    assert ours.generate_ids([[1, 2]], max_new_tokens=4, eos_token_ids=given) == [free[: free.index(free[-1])]]
