"""Vocabularies that were resized with the adapter, and rows of single tokens; held against PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pos2d import exporter, load
from pos2d.errors import InputError
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, weights, write_adapter, write_base, write_tokenizer
from tests.sources.test_peft import EMBEDDING, HEAD, TIED, UNTIED, shake, train, weights_of

ROWS = 300
BOTH: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
KEPT_TIED: dict[str, Any] = BOTH | {"ensure_weight_tying": True}
# Base, rows, settings.
RESIZED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "more, saved along": (UNTIED, 307, {}),
    "fewer, saved along": (UNTIED, 290, {}),
    "more, trained whole": (UNTIED, 307, BOTH),
    "fewer, trained whole": (UNTIED, 290, BOTH),
    "one trained whole, the other saved along": (UNTIED, 307, {"modules_to_save": ["lm_head"]}),
    "factors for both": (UNTIED, 307, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "rows of tokens": (UNTIED, 307, {"trainable_token_indices": [4, 305]}),
    "tied, saved along": (TIED, 307, {}),
    "tied, fewer": (TIED, 290, {}),
    "tied, trained whole as one": (TIED, 307, KEPT_TIED),
    "tied, trained whole as two": (TIED, 307, BOTH),
    "tied, head trained whole": (TIED, 307, {"modules_to_save": ["lm_head"]}),
    "tied, factors for the embedding": (TIED, 307, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, factors for the head": (TIED, 307, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, rows of tokens": (TIED, 307, {"trainable_token_indices": [4, 305]}),
}
TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "rows of the embedding": (UNTIED, {"trainable_token_indices": [250, 4, 77]}),
    "rows by name": (UNTIED, {"trainable_token_indices": {"model.embed_tokens": [4], "lm_head": [9, 8]}}),
    "rows of the head": (UNTIED, {"trainable_token_indices": {"lm_head": [9]}}),
    "rows and factors of the head": (UNTIED, {"trainable_token_indices": [4], "target_modules": ["lm_head"]}),
    "tied rows": (TIED, {"trainable_token_indices": [250, 4]}),
    "tied rows, asked for": (TIED, {"trainable_token_indices": [250, 4], "ensure_weight_tying": True}),
    "tied, the same rows twice": (TIED, {"trainable_token_indices": {"embed_tokens": [4], "lm_head": [4]}}),
    "tied, other rows": (TIED, {"trainable_token_indices": {"embed_tokens": [4], "lm_head": [5, 6]}}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name.replace(" ", "-"), CONFIGS[name]) for name in (UNTIED, TIED)}


def train_resized(base: Path, rows: int, **settings: Any) -> PeftModel:
    torch.manual_seed(rows)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | settings
    peft = get_peft_model(model, LoraConfig(**config))
    shake(peft, 1)
    return peft


def assert_computes(out: Path, trained: PeftModel, vocab: int) -> None:
    """The merged directory, as transformers loads it, gives the logits of the model that was trained."""
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    ids = torch.arange(40)[None] * 7 % vocab
    with torch.no_grad():
        found, expected = model(ids).logits, trained.eval()(ids).logits
    assert found.shape == expected.shape == (1, 40, vocab)
    # Both compute in float32, on logits below 100.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    moved = float((expected - expected.mean()).abs().max())
    assert moved > 1


@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_is_merged(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    base, rows, settings = RESIZED[case]
    trained = train_resized(bases[base], rows, **settings)
    trained.save_pretrained(tmp_path / "adapter")
    report = exporter.merge(bases[base], tmp_path / "adapter", tmp_path / "out", no_patch_rope=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == rows
    assert read_manifest(tmp_path / "out").vocab_size == rows
    assert all(len(tensor) == rows for name, tensor in weights(tmp_path / "out").items() if name in (EMBEDDING, HEAD))
    assert report.ledger is not None
    assert report.ledger[EMBEDDING].elements == rows * 48
    assert_computes(tmp_path / "out", trained, rows)


@pytest.mark.parametrize("case", TOKENS)
def test_rows_of_tokens_are_merged(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    base, settings = TOKENS[case]
    trained = train(bases[base], **settings)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    exporter.merge(bases[base], tmp_path / "adapter", tmp_path / "out", no_patch_rope=True)
    assert_computes(tmp_path / "out", trained, ROWS)
    before, found = weights_of(bases[base]), weights(tmp_path / "out")
    changed = (found[EMBEDDING] != before[EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
    named = settings["trainable_token_indices"]
    embedding = named if isinstance(named, list) else named.get("embed_tokens", named.get("model.embed_tokens", []))
    assert changed == sorted(embedding)


def test_a_resized_model_is_exported_and_runs(bases: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, special=["<new>"])
    trained = train_resized(bases[TIED], 320, **BOTH)
    trained.save_pretrained(tmp_path / "adapter")
    inputs: dict[str, Any] = {
        "base_model": bases[TIED],
        "lora": tmp_path / "adapter",
        "no_patch_rope": True,
        "tokenizer": tmp_path,
    }
    exporter.merge(output=tmp_path / "merged", **inputs)
    exporter.export(None, tmp_path / "onnx", format="onnx", no_verify=True, **inputs)
    exporter.export(None, tmp_path / "bnb", format="bnb", quant="8bit", **inputs)
    vocabularies = {read_manifest(tmp_path / name).vocab_size for name in ("merged", "onnx", "bnb")}
    assert vocabularies == {320}
    texts = [load(tmp_path / name).generate("a<new>", max_new_tokens=8)[0].text for name in ("merged", "onnx")]
    assert texts[0] == texts[1]
    stored = load_file(tmp_path / "bnb" / "model.safetensors")
    assert len(stored[EMBEDDING]) == len(stored[HEAD]) == 320


def test_a_full_fine_tune_may_have_more_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases[UNTIED])
    model.resize_token_embeddings(311, mean_resizing=False)
    state = {name: tensor + 0.5 for name, tensor in model.state_dict().items()}
    lora = write_adapter(tmp_path / "full.pth", state)
    exporter.merge(bases[UNTIED], lora, tmp_path / "out", no_patch_rope=True)
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_half_resized_vocabulary_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    def refusal(base: str, drop: str = "", weight: str = "", **settings: Any) -> str:
        adapter = tmp_path / "adapter"
        train_resized(bases[base], 307, **settings).save_pretrained(adapter, save_embedding_layers=drop != "both")
        file = adapter / "adapter_model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(file).items() if not drop or drop not in name}
        save_file(tensors, file)
        with pytest.raises(InputError) as caught:
            exporter.merge(bases[base], f"{adapter}{weight}", tmp_path / "out", no_patch_rope=True)
        assert "\n" not in str(caught.value)
        assert "vocabulary" in str(caught.value)
        return str(caught.value)

    assert "new values of lm_head.weight" in refusal(UNTIED, drop="lm_head")
    assert "new values of model.embed_tokens.weight" in refusal(UNTIED, drop="model.embed_tokens")
    assert "new values of model.embed_tokens.weight" in refusal(
        TIED, drop="model.embed_tokens", modules_to_save=["lm_head"]
    )
    factors: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"]}
    assert "new values of" in refusal(UNTIED, drop="both", **factors)
    assert "use weight 1" in refusal(UNTIED, weight="=0.5", **BOTH)
