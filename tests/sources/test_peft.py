"""PEFT's own merges are the reference; both sides calculate in float64, so they agree to its rounding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pos2d.sources.adapters import read_adapters
from pos2d.sources.adapters.adapter import Adapter
from pos2d.sources.adapters.deltas import exact_sum
from pos2d.sources.adapters.peft import read_peft
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from tests.bases import CONFIGS, write_base

UNTIED, TIED = "qwen3 with biases", "qwen2 with linear rope"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Sums of at most 300 terms below 100, each rounded to 2**-53 of itself.
EXACT = 300 * 100 * 2.0**-53
BLOCK = 37
QUERIES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# PEFT's own words, on what it asks of transformers and on settings that are meant here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules were found"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.* have invalid shape. .*lora_B.bias"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    names = (UNTIED, TIED, "llama with llama3 rope", "llama with yarn rope")
    return {name: write_base(root / name.replace(" ", "-"), CONFIGS[name]) for name in names}


def train(base: Path, seed: int = 1, **settings: Any) -> PeftModel:
    """A PEFT model with every trainable parameter moved at random, so that nothing of it is zero."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model, seed)
    return model


def shake(model: PeftModel, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def weights_of(base: Path) -> dict[str, torch.Tensor]:
    weights = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    return {HEAD: weights[EMBEDDING], **weights}


def merged(base: Path, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """The base with the deltas of all adapters, calculated in blocks of rows as a merge does."""
    weights = weights_of(base)
    for name in {name for adapter in adapters for name in adapter.deltas}:
        deltas = [delta.widened() for adapter in adapters for delta in adapter.deltas.get(name, ())]
        weight = weights[name]
        blocks = [slice(start, start + BLOCK) for start in range(0, len(weight), BLOCK)]
        weights[name] = torch.cat([exact_sum(weight[rows], deltas, rows)[0] for rows in blocks])
    return weights


def merged_by_peft(model: PeftModel) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = model.double().merge_and_unload().state_dict()
    return state


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: Path, changed: set[str]) -> None:
    before = weights_of(base)
    assert set(ours) == set(theirs) == set(before)
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape
        assert (weight - theirs[name]).abs().max() <= EXACT, name
        assert torch.equal(weight, before[name]) == (name not in changed), name
        assert torch.equal(theirs[name], before[name]) == (name not in changed), name


VARIANTS: dict[str, dict[str, Any]] = {
    "alpha over r": {},
    "attention and mlp": {"target_modules": ["q_proj", "o_proj", "down_proj", "up_proj"], "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "v_proj|down_proj": 5},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 11, "q_proj": 1},
    },
    "patterns and rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True},
    "pattern of a part of a name": {"target_modules": ["o_proj"], "rank_pattern": {"proj": 2}},
    "bias of targets": {"bias": "lora_only", "target_modules": ["k_proj", "down_proj"]},
    "every bias": {"bias": "all"},
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]},
    "saved by any end of the name": {"modules_to_save": ["norm", "v_proj"]},
    "saved parents": {"modules_to_save": ["0.mlp"], "target_modules": ["q_proj", "up_proj"]},
    "dora": {"use_dora": True, "target_modules": ["k_proj", "gate_proj", "down_proj"], "bias": "lora_only"},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "lora bias and bias": {"lora_bias": True, "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"], "rank_pattern": {"embed_tokens": 3}},
    "embedding named in full": {"target_modules": ["model.embed_tokens"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "all linear but": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "0.mlp.up_proj"]},
    "expression": {"target_modules": r".*\.1\.(self_attn|mlp)\.(v|up)_proj"},
    "expression but": {"target_modules": r".*_proj", "exclude_modules": r".*\.0\..*"},
    "one layer": {"layers_to_transform": 1, "target_modules": ALL},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers and a full name": {
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
        "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"],
    },
    "ends of names": {"target_modules": ["0.self_attn.q_proj", "proj", "up_proj"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "tying without a tie": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_is_that_of_peft(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    # The other base has no bias on q_proj; this one has biases everywhere in the attention and none in the MLP.
    base = bases["llama with llama3 rope" if "bias" in VARIANTS[variant] else UNTIED]
    model = train(base, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, read_base(str(base)))
    assert_same(merged(base, [adapter]), merged_by_peft(model), base, set(adapter.deltas))
    assert (adapter.form, adapter.path, len(adapter.sha256)) == ("peft", tmp_path, 64)


def test_a_base_without_biases_owes_none(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama with yarn rope"]
    model = train(base, bias="lora_only")
    model.save_pretrained(tmp_path)
    assert_same(merged(base, [read_peft(tmp_path, read_base(str(base)))]), merged_by_peft(model), base, set(QUERIES))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_the_pickled_form_is_the_same(bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    model = train(bases[UNTIED], **settings)
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    model.save_pretrained(tmp_path / "safe")
    assert not (tmp_path / "pickled" / "adapter_model.safetensors").exists()
    base = read_base(str(bases[UNTIED]))
    pickled, safe = (merged(bases[UNTIED], [read_peft(tmp_path / form, base)]) for form in ("pickled", "safe"))
    assert all(torch.equal(pickled[name], tensor) for name, tensor in safe.items())
    assert_same(pickled, merged_by_peft(model), bases[UNTIED], set(read_peft(tmp_path / "safe", base).deltas))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"use_dora": True, "bias": "all"},
        {"lora_bias": True, "modules_to_save": ["lm_head", "norm"]},
    ],
)
def test_half_an_adapter_goes_half_the_way(bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    base = bases[UNTIED]
    model = train(base, **settings)
    model.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, read_base(str(base)), weight=0.5)
    before, whole = weights_of(base), merged_by_peft(model)
    half = {name: (weight + whole[name]) / 2 for name, weight in before.items()}
    assert adapter.weight == 0.5
    assert_same(merged(base, [adapter]), half, base, set(adapter.deltas))


def test_several_weighted_adapters_are_their_sum(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[UNTIED]
    one = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    two = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "o_proj"], use_rslora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), one, adapter_name="one")
    model.add_adapter("two", two)
    model.base_model.set_adapter(["one", "two"])
    shake(model, 1)
    model.save_pretrained(tmp_path)
    paths = [f"{tmp_path / 'one'}=0.7", f"{tmp_path / 'two'}=-1.5"]
    adapters = read_adapters(paths, read_base(str(base)))
    model.double().add_weighted_adapter(["one", "two"], [0.7, -1.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    changed = {name for adapter in adapters for name in adapter.deltas}
    assert [adapter.ranks for adapter in adapters] == [[2], [3]]
    assert_same(merged(base, adapters), merged_by_peft(model), base, changed)


TYING = {"ensure_weight_tying": True}
ON_TIED_BASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {EMBEDDING}),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, {HEAD}),
    "embedding kept tied": ({"target_modules": ".*(q_proj|embed_tokens)", **TYING}, {EMBEDDING, HEAD}),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, {EMBEDDING, HEAD}),
    "saved embedding": ({"modules_to_save": ["embed_tokens"]}, {EMBEDDING}),
    "saved head": ({"modules_to_save": ["lm_head"]}, {HEAD}),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {EMBEDDING, HEAD}),
    "neither": ({}, set()),
    "kept tied": ({"target_modules": ["lm_head", "q_proj"], **TYING}, {EMBEDDING, HEAD}),
    "kept tied by expression": ({"target_modules": ".*(q_proj|lm_head)", **TYING}, {EMBEDDING, HEAD}),
    "saved and kept tied": ({"modules_to_save": ["lm_head"], **TYING}, {EMBEDDING, HEAD}),
    "dora head": ({"target_modules": r".*lm_head$|.*\.q_proj", "use_dora": True}, {HEAD}),
}


@pytest.mark.parametrize("case", ON_TIED_BASES)
def test_a_tied_base_comes_apart_as_in_training(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    """``merge_and_unload`` would change both at once; what was trained is the model before it is merged."""
    base, (settings, changed) = bases[TIED], ON_TIED_BASES[case]
    model = train(base, **settings).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False if settings.get("use_dora") else "auto")
    ours, before = merged(base, [read_peft(tmp_path, read_base(str(base)))]), weights_of(base)
    assert {name for name in (EMBEDDING, HEAD) if not torch.equal(ours[name], before[name])} == changed
    assert torch.equal(ours[EMBEDDING], ours[HEAD]) == (not changed or bool(settings.get("ensure_weight_tying")))
    config = AutoModelForCausalLM.from_pretrained(base).config
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config).double().eval()
    untied.load_state_dict(ours)
    tokens = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        found, expected = untied(tokens).logits, model.double()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def save(tmp_path: Path, model: PeftModel, **flags: Any) -> Path:
    model.save_pretrained(tmp_path, **flags)
    return tmp_path


def test_base_weights_that_were_saved_along_are_used(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(bases[UNTIED], target_modules=["embed_tokens", "q_proj"])
    with torch.no_grad():
        model.get_input_embeddings().base_layer.weight.mul_(1.5)
        model.get_output_embeddings().weight.mul_(0.5)
    path = save(tmp_path, model)
    adapter = read_peft(path, read_base(str(bases[UNTIED])))
    theirs = merged_by_peft(model)
    theirs[HEAD] = weights_of(bases[UNTIED])[HEAD]  # not saved: it was not a target
    assert_same(merged(bases[UNTIED], [adapter]), theirs, bases[UNTIED], {EMBEDDING, *QUERIES})


def test_base_weights_that_were_asked_for_are_used(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(bases[UNTIED])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
        model.get_input_embeddings().weight.mul_(1.5)
    adapter = read_peft(save(tmp_path, model, save_embedding_layers=True), read_base(str(bases[UNTIED])))
    changed = {EMBEDDING, HEAD, *QUERIES}
    assert_same(merged(bases[UNTIED], [adapter]), merged_by_peft(model), bases[UNTIED], changed)


def test_on_a_tied_base_saved_base_weights_stand_for_both(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(bases[TIED], target_modules=["embed_tokens"], init_lora_weights=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    ours = merged(bases[TIED], [read_peft(save(tmp_path, model), read_base(str(bases[TIED])))])
    torch.testing.assert_close(ours[HEAD], model.get_output_embeddings().weight.double(), rtol=0, atol=0)
    assert not torch.equal(ours[EMBEDDING], ours[HEAD])


def test_copies_of_saved_modules_count_once(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT writes them where the vocabulary was resized, and where every bias is trained."""
    model = train(bases[UNTIED], modules_to_save=["embed_tokens", "k_proj"], bias="all")
    path = save(tmp_path, model, save_embedding_layers=True)
    names = load_file(path / "adapter_model.safetensors")
    assert any(".original_module." in name for name in names)
    assert any(".modules_to_save." in name for name in names)
    adapter = read_peft(path, read_base(str(bases[UNTIED])))
    changed = set(adapter.deltas) - {HEAD}
    assert EMBEDDING in changed
    assert_same(merged(bases[UNTIED], [adapter]), merged_by_peft(model), bases[UNTIED], changed)


def test_prefixes_of_wrappers_are_dropped(bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base: Checkpoint = read_base(str(bases[UNTIED]))
    path = save(tmp_path, train(bases[UNTIED], use_dora=True))
    before = merged(bases[UNTIED], [read_peft(path, base)])
    file = path / "adapter_model.safetensors"
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(file).items()}
    wrapped = {f"module._orig_mod.base_model.model._orig_mod.module.{name}": tensor for name, tensor in plain.items()}
    old = {name + ".weight" if name.endswith("magnitude_vector") else name: tensor for name, tensor in wrapped.items()}
    for tensors in (plain, wrapped, old):
        save_file(tensors, file)
        after = merged(bases[UNTIED], [read_peft(path, base)])
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
