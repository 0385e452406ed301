"""What the tensors of a PEFT directory may not be: each is one sentence that names the file and the fault."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pos2d.errors import InputError, UnsafeInputError
from pos2d.sources.adapters.peft import read_peft
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from tests.bases import CONFIGS, write_base
from tests.peft_files import (
    HIDDEN,
    PREFIX,
    RANK,
    VOCAB,
    WEIGHTS,
    A,
    B,
    Edit,
    Q,
    Tensors,
    add,
    drop,
    refusal,
    write_peft,
)

UNTIED, TIED, PLAIN = "qwen3 with biases", "qwen2 with linear rope", "llama with yarn rope"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: read_base(str(write_base(root / str(i), CONFIGS[name]))) for i, name in enumerate((UNTIED, TIED, PLAIN))
    }


def test_the_adapter_of_these_tests_is_good(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    write_peft(tmp_path)
    assert all(len(read_peft(tmp_path, base).deltas) == 2 for base in bases.values())


def fill(value: float, dtype: torch.dtype = torch.float32) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[PREFIX + A] = torch.full((RANK, HIDDEN), value).to(dtype)

    return edit


def twice(tensors: Tensors) -> None:
    tensors[A] = torch.ones(RANK, HIDDEN)


Case = tuple[list[Edit], dict[str, Any], str]
CASES: dict[str, Case] = {
    "no B": ([drop(B)], {}, f"missing tensors {B};"),
    "no A": ([drop(A)], {}, f"missing tensors {A};"),
    "no module": ([drop(A, B)], {}, f"missing tensors {A}, {B};"),
    "more targets": ([], {"target_modules": ["q_proj", "k_proj"]}, "missing tensors model.layers.0.self_attn.k_proj"),
    "fewer targets": ([], {"layers_to_transform": [1]}, f"left-over tensors {A}, {B};"),
    "excluded": ([], {"exclude_modules": [Q]}, f"left-over tensors {A}, {B};"),
    "another model": ([add("score.weight", shape=(2, 48))], {}, "left-over tensors score.weight;"),
    "base of a target": ([add(f"{Q}.base_layer.weight", shape=(48, 48))], {}, f"left-over tensors {Q}.weight;"),
    "wrong rank": ([], {"r": 2}, f"{A} (4, 48) instead of (2, 48)"),
    "wrong rank of one": ([], {"rank_pattern": {Q: 3}}, f"{B} (48, 4) instead of (48, 3);"),
    "wrong shape": ([add(A, shape=(4, 40))], {}, f"wrong shapes {A} (4, 40) instead of (4, 48);"),
    "not a matrix": ([add(A, shape=(192,))], {}, f"wrong shapes {A} (192,) instead of (4, 48);"),
    "NaN": ([fill(float("nan"))], {}, f"tensor {A} has NaN"),
    "infinite": ([fill(float("inf"))], {}, f"tensor {A} has NaN or infinite"),
    "NaN in a byte": ([fill(float("nan"), torch.float8_e4m3fn)], {}, f"tensor {A} has NaN"),
    "whole numbers": ([fill(1, torch.int64)], {}, f"tensor {A} is torch.int64"),
    "no magnitude": ([], {"use_dora": True}, f"missing tensors {Q}.lora_magnitude_vector"),
    "magnitude": ([add(f"{Q}.lora_magnitude_vector", shape=(48,))], {}, f"left-over tensors {Q}.lora_magnitude_vector"),
    "nothing saved": ([], {"modules_to_save": ["norm"]}, "missing tensors model.layers.0.input_layernorm.weight"),
    "resized": (
        [add("lm_head.weight", shape=(310, 48))],
        {"modules_to_save": ["lm_head"]},
        "changes the vocabulary from 300 to 310 rows, but does not have the new values of model.embed_tokens.weight",
    ),
    "resized along": (
        [add("lm_head.weight", shape=(310, 48))],
        {},
        "changes the vocabulary from 300 to 310 rows, but does not have the new values of model.embed_tokens.weight",
    ),
    "no bias": ([], {"bias": "all"}, "missing tensors model.layers.0.self_attn.k_proj.bias"),
    "bias": ([add(f"{Q}.base_layer.bias", shape=(48,))], {}, f"left-over tensors {Q}.bias;"),
    "no lora bias": ([], {"lora_bias": True}, f"missing tensors {Q}.lora_B.bias"),
    "lora bias": ([add(f"{Q}.lora_B.bias", shape=(48,))], {}, f"left-over tensors {Q}.lora_B.bias;"),
    "lost biases": ([], {"bias": "lora_only"}, f"lacks the biases that bias 'lora_only' trained, {Q}.bias"),
    "one lost bias": (
        [add(f"{Q}.bias", shape=(48,))],
        {"bias": "lora_only"},
        "missing tensors model.layers.1.self_attn",
    ),
    "nothing": ([Tensors.clear], {"target_modules": ["c_attn"]}, "names no module of"),
    "twice": ([twice], {}, f"tensor {A} occurs twice"),
    "dora on the embedding": (
        [],
        {"use_dora": True, "target_modules": ["embed_tokens"]},
        f"use_dora on {EMBEDDING} is",
    ),
    "bias of an embedding": ([], {"lora_bias": True, "target_modules": ["embed_tokens"]}, f"lora_bias on {EMBEDDING} "),
    "another copy": (
        [add("lm_head.weight", "lm_head.modules_to_save.weight", shape=(VOCAB, HIDDEN))],
        {"modules_to_save": ["lm_head"]},
        "lm_head.modules_to_save.weight differs from lm_head.weight",
    ),
    "a copy alone": (
        [add("lm_head.modules_to_save.weight", shape=(VOCAB, HIDDEN))],
        {"modules_to_save": ["lm_head"]},
        "missing tensors lm_head.weight;",
    ),
    "dora over base weights": (
        [
            add("lm_head.base_layer.weight", shape=(VOCAB, HIDDEN)),
            add("lm_head.lora_A.weight", shape=(RANK, HIDDEN)),
            add("lm_head.lora_B.weight", shape=(VOCAB, RANK)),
            add("lm_head.lora_magnitude_vector", shape=(VOCAB,)),
            add(f"{Q}.lora_magnitude_vector", f"{Q.replace('0', '1')}.lora_magnitude_vector", shape=(48,)),
        ],
        {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
        "has base weights lm_head.weight of modules that use_dora rescales",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_not_what_its_configuration_says_is_refused(
    bases: dict[str, Checkpoint], tmp_path: Path, case: str
) -> None:
    edits, settings, sentence = CASES[case]
    assert sentence in refusal(tmp_path, bases[UNTIED], *edits, **settings)


def test_a_bias_that_the_base_has_no_place_for_is_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    assert f"lora_bias needs a bias in the base, but {Q}" in refusal(tmp_path, bases[PLAIN], lora_bias=True)


BOTH = add(f"{EMBEDDING}.weight", f"{HEAD}.weight", shape=(VOCAB, HIDDEN))
DOWN, UP = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
EMBEDDING_PAIR = [add(DOWN, shape=(RANK, VOCAB)), add(UP, shape=(HIDDEN, RANK))]
CONTRADICTION = f"ensure_weight_tying is true, but the tensors of {EMBEDDING} and {HEAD} differ"


def test_base_weights_of_a_tied_base_that_differ_are_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    assert f"{EMBEDDING}.weight and {HEAD}.weight differ" in refusal(tmp_path, bases[TIED], BOTH)
    write_peft(tmp_path, BOTH)
    assert len(read_peft(tmp_path, bases[UNTIED]).deltas) == 4


def test_modules_saved_as_tied_that_differ_are_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    assert CONTRADICTION in refusal(tmp_path, bases[TIED], BOTH, **settings)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_factors_saved_as_tied_that_differ_are_refused(bases: dict[str, Checkpoint], tmp_path: Path, side: str) -> None:
    def mirror(tensors: Tensors, wrong: int) -> None:
        for name, other in (("lora_A", UP), ("lora_B", DOWN)):
            same = tensors[PREFIX + other].T.contiguous()
            tensors[f"{PREFIX}{HEAD}.{name}.weight"] = same + wrong * (name == side)

    settings = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    equal = write_peft(tmp_path, *EMBEDDING_PAIR, lambda tensors: mirror(tensors, 0), **settings)
    assert len(read_peft(equal, bases[TIED]).deltas) == 4
    assert CONTRADICTION in refusal(tmp_path, bases[TIED], *EMBEDDING_PAIR, lambda t: mirror(t, 1), **settings)


def test_a_tied_head_that_is_missing_is_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    assert "missing tensors lm_head.lora_A.weight" in refusal(tmp_path, bases[TIED], *EMBEDDING_PAIR, **settings)


def test_a_directory_without_weights_is_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    write_peft(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors and no adapter_model\.bin"):
        read_peft(tmp_path, bases[UNTIED])
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json does not exist"):
        read_peft(tmp_path, bases[UNTIED])


def test_damaged_weights_are_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    write_peft(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for content in (b"", whole[:100], whole[:-100], b"\xff" * 1000):
        (tmp_path / WEIGHTS).write_bytes(content)
        with pytest.raises(InputError, match=r"adapter_model\.safetensors cannot be read"):
            read_peft(tmp_path, bases[UNTIED])


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch bombed",)


def test_pickled_weights_are_never_run(
    bases: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_peft(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({A: Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeInputError):
        read_peft(tmp_path, bases[UNTIED])
    assert not Path("bombed").exists()


SLOW = "([a-z._0-9]|[a-z.]|[a-z])+[A-Z]"


@pytest.mark.parametrize("settings", [{"target_modules": SLOW}, {"rank_pattern": {SLOW: 4}}])
def test_an_expression_that_takes_for_ever_is_refused(
    bases: dict[str, Checkpoint], tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert "takes too long" in refusal(tmp_path / "adapter", next(iter(bases.values())), **settings)
