"""The model card of every artifact."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pos2d import exporter, runtime
from pos2d.commands.main import COMMANDS, command_of
from pos2d.exporter.artifact.card import write_card
from pos2d.manifest import Manifest, read_manifest
from pos2d.sources.sidecars.tokenizer_settings import readable_settings
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base
from tests.conftest import Golden

LICENCE = "---\nlicense: other\nlicense_name: ours\nlicense_link: https://example.org/x\ntags: [a]\n---\n\n# Base\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with artifacts of one base and adapter, whose card states a licence."""
    place = tmp_path_factory.mktemp("cards")
    base = write_base(place / "base", CONFIGS["llama"])
    (base / "README.md").write_text(LICENCE, encoding="utf-8")
    lora = write_adapter(place / "lora.pth", random_adapter(linear_modules(base)))
    inputs: dict[str, Any] = {"base_model": base, "lora": lora, "pair_indices": [6, 3, 5, 1]}
    exporter.merge(output=place / "merged", **inputs)
    exporter.merge(base, lora, place / "plain", no_patch_rope=True)
    exporter.export(place / "merged", place / "onnx", no_verify=True)
    exporter.export(None, place / "int8", quant="int8", no_calibration=True, **inputs)
    exporter.export(None, place / "bnb", format="bnb", quant="8bit", **inputs)
    exporter.export(place / "merged", place / "stock", format="stock")
    return place


KINDS = ["merged", "plain", "onnx", "int8", "bnb", "stock"]


def text_of(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", KINDS)
def test_every_artifact_has_a_card(made: Path, name: str) -> None:
    manifest, text = read_manifest(made / name), text_of(made / name)
    assert manifest.files["README.md"]["bytes"] == len(text.encode())
    assert runtime.verify(made / name).passed
    data = ModelCard.load(made / name / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert {"pos2d", manifest.kind} <= set(data["tags"])
    assert ("2d-rope" in data["tags"]) == manifest.rope_2d.is_2d
    assert "base_model" not in data, "a base that is not on the Hub has no name there"
    (adapter,) = manifest.adapters
    for fact in (manifest.base["config_sha256"], adapter["sha256"], "rank 4", f"{manifest.context_length} tokens"):
        assert fact in text
    assert str(made) not in text
    check_commands(text)


def check_commands(text: str) -> None:
    """Python programs can be read, and commands of ours exist with all their flags."""
    for program in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(program)
    assert "{" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    shell = "".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    for verb, rest in re.findall(r"^pos2d (\S+)(.*)$", shell, flags=re.MULTILINE):
        assert verb in COMMANDS
        flags = {name for parameter in command_of(verb).params for name in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= flags


def test_what_each_kind_says(made: Path) -> None:
    stated = (
        "2D RoPE: rotary frequencies 1, 3, 5, 6 of 6 (ratio 0.666667) encode branch and time; stride 128, align left"
    )
    expected = {
        "merged": [
            stated,
            "in float32",
            "trust_remote_code=True",
            "100.0% of what the adapter changes is left after rounding to",
        ],
        "plain": ["ordinary", "vllm serve MODEL", "in float32", "that do not see each other", "100.0% of what"],
        "onnx": [stated, "in float32", "`manifest.json` names all their inputs"],
        "int8": [
            stated,
            "15 layers in 8 bits, in blocks of 32; the others in float32",
            "mean KL",
            "left after quantising",
        ],
        "bnb": [stated, "quantised to 8bit, in the format of bitsandbytes", "with bitsandbytes installed"],
        "stock": ["one branch of a model with 2D RoPE", "## One branch only", "vllm serve MODEL", "top token agrees"],
    }
    for name, parts in expected.items():
        for part in parts:
            assert part in text_of(made / name), (name, part)
    assert "vllm" not in text_of(made / "merged")
    assert "trust_remote_code=True" not in text_of(made / "plain")
    assert "| checked |" in text_of(made / "stock")
    assert "| checked |" not in text_of(made / "bnb")


@pytest.mark.parametrize("name", KINDS)
def test_the_licence_is_that_of_the_base(made: Path, name: str) -> None:
    """Also where the weights come from a merge, in whose card it stands, or in what its owner made of that."""
    data = ModelCard.load(made / name / "README.md").data.to_dict()
    found = {key: value for key, value in data.items() if key.startswith("license")}
    assert found == {"license": "other", "license_name": "ours", "license_link": "https://example.org/x"}


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: [mit\n---\n", {}, None),
        ("no metadata", {"license": "mit"}, "mit"),
        ("---\nlicense: 4\n---\n", {}, None),
        ("---\n- list\n---\n", {}, None),
        ("---\nlicense: apache-2.0\nlicense_name: [1]\n---\n", {"license": "mit"}, "apache-2.0"),
        (b"\xff\xfe\x00", {}, None),
    ],
)
def test_a_card_of_a_base_that_cannot_be_read_says_nothing(
    qwen2: Golden, tmp_path: Path, card: str | bytes, config: dict[str, Any], expected: str | None
) -> None:
    base = Path(shutil.copytree(qwen2.path / "base", tmp_path / "base"))
    (base / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    exporter.merge(output=tmp_path / "out", **qwen2.flags | {"base_model": base})
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data.get("license") == expected


def test_equal_inputs_give_equal_bytes(made: Path, tmp_path: Path) -> None:
    exporter.merge(made / "base", made / "lora.pth", tmp_path / "merged", pair_indices=[6, 3, 5, 1])
    assert text_of(tmp_path / "merged") == text_of(made / "merged")
    (tmp_path / "merged" / "README.md").write_text("mine", encoding="utf-8")
    report = exporter.merge(
        made / "base", made / "lora.pth", tmp_path / "merged", pair_indices=[6, 3, 5, 1], resume=True
    )
    assert report.was_finished
    assert text_of(tmp_path / "merged") == "mine"


Edit = Callable[[Manifest], Manifest]


def card_of(manifest: Manifest, place: Path) -> tuple[str, dict[str, Any]]:
    write_card(place, manifest, {})
    check_commands(text_of(place))
    return text_of(place), ModelCard.load(place / "README.md").data.to_dict()


def test_metadata_of_a_base_on_the_hub(made: Path, tmp_path: Path) -> None:
    base = {"name": "someone/base", "revision": "5" * 40, "config_sha256": "6" * 64}
    merged, int8 = (replace(read_manifest(made / name), base=base) for name in ("merged", "int8"))
    for manifest, relation in (
        (merged, "finetune"),
        (int8, "finetune"),
        (replace(int8, adapters=()), "quantized"),
        (replace(merged, adapters=()), None),
    ):
        text, data = card_of(manifest, tmp_path)
        assert data["base_model"] == "someone/base"
        assert data.get("base_model_relation") == relation
        assert f"at revision `{'5' * 40}`" in text
    several = ({"file": "a.pth", "sha256": "7" * 64, "ranks": [4, 8], "weight": 0.5}, {"file": "b", "sha256": "8" * 64})
    text, _ = card_of(replace(merged, adapters=several), tmp_path)
    assert "with the LoRA adapters `a.pth`, `b` merged" in text
    assert f"`a.pth`, rank 4 to 8, weight 0.5, SHA-256 `{'7' * 64}`" in text


def test_kinds_for_other_programs(made: Path, tmp_path: Path) -> None:
    """One branch as a file of llama.cpp and as a graph of onnxruntime-genai."""
    stock = read_manifest(made / "stock")
    gguf = replace(
        stock,
        kind="gguf",
        files={"model-q8_0.gguf": {"bytes": 9}, "Modelfile": {"bytes": 1}},
        parity={"tensors": 21},
    )
    text, data = card_of(gguf, tmp_path)
    assert data["library_name"] == "llama.cpp"
    for part in ("llama-server -m MODEL/model-q8_0.gguf", "ollama create NAME -f Modelfile", "21 tensors read back"):
        assert part in text
    assert "transformers" not in text
    assert "ollama" not in card_of(replace(gguf, files={"model.gguf": {"bytes": 9}}), tmp_path)[0]
    genai = replace(stock, kind="genai", files={"model.onnx": {"bytes": 9}})
    text, data = card_of(genai, tmp_path)
    assert data["library_name"] == "onnxruntime-genai"
    assert 'og.Model("MODEL")' in text
    assert "apply_chat_template" not in text
    templated = replace(genai, files={**genai.files, "chat_template.jinja": {"bytes": 1}})
    assert "apply_chat_template" in card_of(templated, tmp_path)[0]


def test_settings_of_a_tokenizer_name_no_place() -> None:
    places = {"name_or_path": "/home/alice/base", "special_tokens_map_file": "/fsx/map.json"}
    for whole in (True, False):
        settings = readable_settings({"tokenizer_class": "LlamaTokenizer"} | places, whole=whole)
        assert not places.keys() & settings.keys()
