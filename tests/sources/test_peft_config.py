"""What adapter_config.json may not say: each is one sentence that names the file, the key and the fault."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from pos2d.errors import InputError
from pos2d.sources.adapters.deltas import LowRank
from pos2d.sources.adapters.peft import read_peft
from pos2d.sources.adapters.peft_config import HARMLESS, REFUSED, USED
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from tests.bases import CONFIGS, write_base
from tests.peft_files import CONFIG, RANK, Q, add, refusal, write_peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_base(str(write_base(tmp_path_factory.mktemp("base"), CONFIGS["qwen3 with biases"])))


def test_the_adapter_of_these_tests_is_good(base: Checkpoint, tmp_path: Path) -> None:
    assert len(read_peft(write_peft(tmp_path), base).deltas) == 2


def test_every_key_of_peft_is_known() -> None:
    fields = {field.name for kind in (LoraConfig, PeftConfig) for field in dataclasses.fields(kind)}
    assert fields <= USED | HARMLESS | set(REFUSED)
    assert not USED & HARMLESS | USED & set(REFUSED) | HARMLESS & set(REFUSED)


def test_all_linear_is_all_but_the_head(base: Checkpoint, tmp_path: Path) -> None:
    """PEFT saves the names instead; others write the word."""
    shapes = {module: shape for module, shape in base.linear_shapes().items() if module != "lm_head"}
    pairs = [
        add(f"{module}.{factor}.weight", shape=shape)
        for module, (rows, columns) in shapes.items()
        for factor, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK)))
    ]
    changes = read_peft(write_peft(tmp_path, *pairs, target_modules="All-Linear"), base).deltas
    assert set(changes) == {f"{module}.weight" for module in shapes}


SET = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "enable_lora": [True, False, True],
    "fan_in_fan_out": True,
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"a": 1},
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["mlp.weight"],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"scale": 1.0},
}


def test_every_key_that_is_refused_is_tested() -> None:
    assert set(SET) == set(REFUSED)


@pytest.mark.parametrize("key", SET)
def test_a_key_that_changes_the_meaning_is_refused(base: Checkpoint, tmp_path: Path, key: str) -> None:
    assert f"{CONFIG}: {key} is set, " in refusal(tmp_path, base, **{key: SET[key]})


@pytest.mark.parametrize("value", [True, 1, 0, "a", {"a": 1}, [0]])
def test_an_unknown_key_is_refused(base: Checkpoint, tmp_path: Path, value: object) -> None:
    assert "unknown key 'use_something'" in refusal(tmp_path, base, use_something=value)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_is_not_set_is_nothing(base: Checkpoint, tmp_path: Path, value: object) -> None:
    write_peft(tmp_path, use_something=value, target_parameters=value)
    assert read_peft(tmp_path, base).deltas


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga"])
def test_an_adapter_of_changed_base_weights_is_refused(base: Checkpoint, tmp_path: Path, init: str) -> None:
    sentence = refusal(tmp_path, base, init_lora_weights=init)
    assert f"init_lora_weights '{init}'" in sentence
    assert "path_initial_model_for_weight_conversion" in sentence


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changes the base"),
    "unknown init": ({"init_lora_weights": "new"}, "init_lora_weights 'new' is not known"),
    "numeric init": ({"init_lora_weights": 1}, "init_lora_weights 1 is not known"),
    "other method": ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
    "no method": ({"peft_type": None}, "peft_type None is not supported"),
    "rank as text": ({"r": "4"}, "r has '4', not a whole number"),
    "rank of nothing": ({"r": None}, "r has None, not a whole number"),
    "rank 0": ({"r": 0}, "r has 0, not a whole number above 0"),
    "rank true": ({"r": True}, "r has True, not a whole number"),
    "rank 4.0": ({"r": 4.0}, "r has 4.0, not a whole number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha has None, not a number above 0"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha has '8', not a number above 0"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha has True, not a number above 0"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha has 0, not a number above 0"),
    "alpha below 0": ({"lora_alpha": -8}, "lora_alpha has -8, not a number above 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha has nan, not a number above 0"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha has inf, not a number above 0"),
    "alpha endless": ({"lora_alpha": 10**400}, "not a number above 0"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern has '2', not a whole number"),
    "alpha of a pattern": ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern has -1, not a number above 0"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern has ['q_proj'], not an object"),
    "broken pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '(', not a regular expression"),
    "contradicting ranks": ({"rank_pattern": {"q_proj": 4, ".*proj": 2}}, f"rank_pattern has several values for {Q}"),
    "contradicting alphas": ({"alpha_pattern": {"q_proj": 4, Q: 2}}, f"alpha_pattern has several values for {Q}"),
    "no targets": ({"target_modules": None}, "target_modules is missing"),
    "a number as target": ({"target_modules": [1]}, "target_modules has [1], not a list of names"),
    "broken target": ({"target_modules": "*q_proj"}, "target_modules has '*q_proj', not a regular expression"),
    "excluded number": ({"exclude_modules": 1}, "exclude_modules has 1, not a list of names"),
    "broken exclusion": ({"exclude_modules": "("}, "exclude_modules has '(', not a regular expression"),
    "saved text": ({"modules_to_save": "lm_head"}, "modules_to_save has 'lm_head', not a list of names"),
    "saved nothing": ({"modules_to_save": [""]}, "modules_to_save has [''], not a list of names"),
    "broken saved": ({"modules_to_save": ["["]}, "modules_to_save has '[', not a regular expression"),
    "saved target": ({"modules_to_save": ["proj"]}, "target_modules and modules_to_save both name"),
    "layer as text": ({"layers_to_transform": "1"}, "layers_to_transform has '1', not numbers of layers"),
    "layer true": ({"layers_to_transform": [True]}, "layers_to_transform has [True], not numbers of layers"),
    "broken layers": ({"layers_pattern": "("}, "layers_pattern has '(', not a regular expression"),
    "numeric layers": ({"layers_pattern": 1}, "layers_pattern has 1, not a list of names"),
    "layers and regex": ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform cannot be"),
    "other bias": ({"bias": "some"}, "bias is 'some', not none, all or lora_only"),
    "flag as text": ({"use_rslora": "false"}, "use_rslora has 'false', not true or false"),
    "dora and lora bias": ({"use_dora": True, "lora_bias": True}, "lora_bias is not supported together with use_dora"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_configuration_that_is_not_understood_is_refused(base: Checkpoint, tmp_path: Path, case: str) -> None:
    settings, sentence = BROKEN[case]
    assert sentence in refusal(tmp_path, base, **settings)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type", "target_modules"])
def test_a_configuration_without_a_key_is_refused(base: Checkpoint, tmp_path: Path, key: str) -> None:
    write_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    del config[key]
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=key):
        read_peft(tmp_path, base)


@pytest.mark.parametrize("content", [b"{", b"[]", b"1", b"\xff\xfe{", b"[" * 100_000, b""])
def test_a_broken_configuration_is_refused(base: Checkpoint, tmp_path: Path, content: bytes) -> None:
    write_peft(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_config\.json (cannot be read|is not a JSON object)"):
        read_peft(tmp_path, base)


OLD_CONFIG = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "base",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 8.0,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


def test_a_configuration_of_an_older_release_is_read(base: Checkpoint, tmp_path: Path) -> None:
    write_peft(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(OLD_CONFIG), encoding="utf-8")
    changes = read_peft(tmp_path, base).deltas
    assert set(changes) == {f"{Q}.weight", f"{Q.replace('0', '1')}.weight"}
    (change,) = changes[f"{Q}.weight"]
    assert isinstance(change, LowRank)
    assert change.scale == 2.0
