"""``inspect``: facts about adapters, bases and artifacts, and which bases an adapter fits."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.commands.shared.inspect_text import aligned
from pos2d.errors import InputError, UnsafeInputError, UsageError
from pos2d.exporter.inspection.adapter_facts import AdapterFacts, fitting_bases
from pos2d.exporter.inspection.known_bases import KINDS, KNOWN_BASES, KnownBase
from pos2d.exporter.inspection.model_facts import ArtifactFacts, BaseFacts
from pos2d.families import Dimensions, expected_tensors
from pos2d.manifest import Manifest
from pos2d.spec import Rope2DSpec, spans
from tests.bases import CONFIGS, HALF_BILLION, linear_modules, random_adapter, square, write_adapter, write_base
from tests.commands.test_errors import Payload
from tests.conftest import GOLDENS

Call = Callable[..., Result]
LORA = GOLDENS / "qwen2_r050_left" / "lora.pth"
BASE = GOLDENS / "qwen2_r050_left" / "base"


def adapter_facts(path: Path) -> AdapterFacts:
    facts = exporter.inspect(path).adapter
    assert facts is not None
    return facts


def lora_of(base: KnownBase, kinds: list[str], rank: int = 2, layers: int | None = None) -> dict[str, torch.Tensor]:
    """A trainer's file with the shapes of a real base; expanded tensors of one value, so it is small on disk."""
    content = {}
    for layer in range(base.layers if layers is None else layers):
        for kind in kinds:
            rows, columns = base.linears()[kind]
            module = f"model.layers.{layer}.{'mlp' if kind in KINDS[4:] else 'self_attn'}.{kind}"
            content[f"{module}.lora.A.weight"] = torch.ones(1).expand(rank, columns)
            content[f"{module}.lora.B.weight"] = torch.ones(1).expand(rows, rank)
    return content


def known(name: str) -> KnownBase:
    return next(base for base in KNOWN_BASES if name in base.name.split(", "))


def write_artifact(directory: Path, spec: Rope2DSpec, **fields: Any) -> Path:
    """A manifest and one file, without weights."""
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"12345")
    Manifest(
        kind="merged",
        family="qwen2",
        dtype="bfloat16",
        vocab_size=300,
        context_length=4096,
        eos_token_ids=(2, 7),
        rope_2d=spec,
        base={"name": "Qwen2.5-0.5B", "config_sha256": "0" * 64},
        adapters=({"file": "lora.pth", "sha256": "1" * 64},),
        options={"dtype": "auto"},
        files={"model.safetensors": {"bytes": 5, "sha256": "2" * 64}},
        tool_version="0.0",
        **fields,
    ).write(directory)
    return directory


def test_a_lora_of_the_trainer() -> None:
    facts = adapter_facts(LORA)
    assert (facts.form, facts.ranks, facts.scales, facts.layers) == ("trainer", (4,), (1.0,), 2)
    assert list(facts.modules) == ["q_proj", "o_proj"]
    assert all(found.layers == 2 and found.shapes == ((64, 64),) for found in facts.modules.values())
    assert (facts.parameters, facts.dtypes) == (2 * 2 * 2 * 64 * 4, {"float32": 8})
    assert facts.bytes == LORA.stat().st_size
    assert (facts.untrained, facts.not_finite, facts.fits) == ((), (), ())
    content = exporter.inspect(GOLDENS / "qwen2_r050_left").adapter
    assert content == facts, "a directory with one .pth is that file"


def test_what_a_lora_shows_of_a_failed_training(tmp_path: Path) -> None:
    content = torch.load(LORA)
    content["model.layers.1.self_attn.q_proj.lora.B.weight"].zero_()
    content["model.layers.0.self_attn.o_proj.lora.A.weight"][0, 0] = float("nan")
    facts = adapter_facts(write_adapter(tmp_path / "lora.pth", content))
    assert facts.untrained == ("model.layers.1.self_attn.q_proj",)
    assert facts.not_finite == ("model.layers.0.self_attn.o_proj",)


def test_a_lora_with_gaps_prefixes_and_other_modules(tmp_path: Path, call: Call) -> None:
    content = {f"module.{name}": tensor for name, tensor in lora_of(known("SmolLM2-135M"), ["q_proj"], 3, 5).items()}
    del content["module.model.layers.2.self_attn.q_proj.lora.A.weight"]
    del content["module.model.layers.2.self_attn.q_proj.lora.B.weight"]
    content["lm_head.lora.A.weight"], content["lm_head.lora.B.weight"] = torch.ones(4, 576), torch.ones(300, 4)
    path = write_adapter(tmp_path / "lora.pth", content)
    facts = adapter_facts(path)
    assert facts.modules["q_proj"].missing_layers == (2,)
    assert facts.other_modules == ("lm_head",)
    assert facts.ranks == (3, 4)
    assert "q_proj (576, 576) in 4 of 5 layers, not in 2" in call("inspect", path).stdout


def test_a_state_dict(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    state = load_file(base / "model.safetensors")
    facts = adapter_facts(write_adapter(tmp_path / "full.pth", state))
    assert (facts.form, facts.ranks, facts.sha256, facts.layers) == ("state dict", (), None, 2)
    assert facts.modules["down_proj"].shapes == ((48, 80),)
    assert facts.parameters == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("base", KNOWN_BASES, ids=lambda base: base.name)
def test_the_square_layers_of_every_known_base_identify_it(base: KnownBase, tmp_path: Path) -> None:
    if not base.square():
        assert base.name in ("Qwen3-4B", "Qwen3-32B")
        return
    fits = adapter_facts(write_adapter(tmp_path / "lora.pth", lora_of(base, base.square()))).fits
    assert base.name in fits
    for name in fits:
        other = next(o for o in KNOWN_BASES if o.name == name)
        assert (other.layers, other.hidden, other.square()) == (base.layers, base.hidden, base.square())


def test_the_trainers_rule_and_the_shapes_exclude_bases(tmp_path: Path) -> None:
    def fits(name: str, kinds: list[str], **sizes: int) -> tuple[str, ...]:
        return adapter_facts(write_adapter(tmp_path / "lora.pth", lora_of(known(name), kinds, **sizes))).fits

    eight_billion = ("Llama-3-8B, Llama-3.1-8B", "Mistral-7B v0.1, v0.2, v0.3")
    # On Llama-2-7B k and v are square as well, so the trainer would have adapted them.
    assert fits("Llama-2-7B", ["q_proj", "o_proj"]) == eight_billion
    assert fits("Llama-2-7B", ["q_proj", "k_proj", "v_proj", "o_proj"]) == ("Llama-2-7B",)
    assert fits("Llama-3-8B", ["q_proj", "o_proj"], layers=31) == ()
    assert fits("Llama-2-70B", ["q_proj", "o_proj", "gate_proj"]) == (
        "Llama-3-70B, Llama-3.1-70B, Llama-3.3-70B",
        "Llama-2-70B",
    )
    assert fits("Qwen2.5-72B", ["q_proj", "o_proj", "gate_proj"]) == ("Qwen2-72B, Qwen2.5-72B",)
    assert fits("Qwen3-0.6B", ["k_proj", "v_proj"]) == ("Qwen3-0.6B",)


def test_shapes_of_known_bases_are_those_of_expected_tensors() -> None:
    expected = expected_tensors(Dimensions.from_config(HALF_BILLION, "config.json"))
    row = known("Qwen2.5-0.5B")
    for kind, shape in row.linears().items():
        room = "mlp" if kind in KINDS[4:] else "self_attn"
        assert expected[f"model.layers.{row.layers - 1}.{room}.{kind}.weight"] == shape


# Parameters in billions as the publishers state them, nearly all of them in linear layers, embedding and head.
@pytest.mark.parametrize(
    ("name", "total", "vocab", "embeddings"),
    [
        ("SmolLM2-135M", 0.1345, 49152, 1),
        ("SmolLM2-360M", 0.3618, 49152, 1),
        ("SmolLM2-1.7B", 1.7114, 49152, 1),
        ("TinyLlama-1.1B", 1.1, 32000, 2),
        ("Llama-3.2-1B", 1.2358, 128256, 1),
        ("Llama-3.2-3B", 3.2127, 128256, 1),
        ("Llama-3-8B", 8.0303, 128256, 2),
        ("Llama-3-70B", 70.5537, 128256, 2),
        ("Llama-2-7B", 6.7384, 32000, 2),
        ("Llama-2-13B", 13.0159, 32000, 2),
        ("Llama-2-70B", 68.9767, 32000, 2),
        ("Mistral-7B v0.1", 7.2417, 32000, 2),
        ("Qwen2.5-0.5B", 0.494, 151936, 1),
        ("Qwen2.5-1.5B", 1.5437, 151936, 1),
        ("Qwen2.5-3B", 3.0859, 151936, 1),
        ("Qwen2.5-7B", 7.6156, 152064, 2),
        ("Qwen2.5-14B", 14.77, 152064, 2),
        ("Qwen2.5-32B", 32.7639, 152064, 2),
        ("Qwen2.5-72B", 72.7062, 152064, 2),
        ("Qwen3-0.6B", 0.596, 151936, 1),
        ("Qwen3-1.7B", 1.7206, 151936, 1),
        ("Qwen3-4B", 4.0225, 151936, 1),
        ("Qwen3-8B", 8.1907, 151936, 2),
        ("Qwen3-14B", 14.7683, 151936, 2),
        ("Qwen3-32B", 32.7621, 151936, 2),
    ],
)
def test_dimensions_of_known_bases_give_their_parameter_counts(
    name: str, total: float, vocab: int, embeddings: int
) -> None:
    base = known(name)
    linear = base.layers * sum(rows * columns for rows, columns in base.linears().values())
    assert (linear + embeddings * vocab * base.hidden) / 1e9 == pytest.approx(total, rel=1e-3)


def write_peft(directory: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def peft_tensors(base: KnownBase, layers: list[int], trained: bool = True) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in layers:
        for kind in ("q_proj", "v_proj"):
            rows, columns = base.linears()[kind]
            module = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            tensors[f"{module}.lora_A.weight"] = torch.ones(4, columns, dtype=torch.bfloat16)
            tensors[f"{module}.lora_B.weight"] = torch.full((rows, 4), float(trained), dtype=torch.bfloat16)
    return tensors


def test_a_peft_directory(tmp_path: Path, call: Call) -> None:
    base = known("Qwen2.5-0.5B")
    path = write_peft(tmp_path / "peft", peft_tensors(base, list(range(24))), alpha_pattern={"v_proj": 2})
    facts = adapter_facts(path)
    assert (facts.form, facts.ranks, facts.scales, facts.layers) == ("peft", (4,), (0.5, 2.0), 24)
    assert facts.dtypes == {"bfloat16": 96}
    assert facts.settings["target_modules"] == ["q_proj", "v_proj"]
    assert facts.fits == ("Qwen2-0.5B, Qwen2.5-0.5B",)
    assert "alpha_pattern {'v_proj': 2}" in call("inspect", path).stdout


def test_a_peft_adapter_of_some_layers(tmp_path: Path) -> None:
    tensors = peft_tensors(known("Qwen2.5-0.5B"), [3, 5], trained=False)
    facts = adapter_facts(write_peft(tmp_path / "some", tensors, layers_to_transform=[3, 5], use_rslora=True))
    assert facts.fits == ("Qwen2-0.5B, Qwen2.5-0.5B",)
    assert facts.scales == (4.0,)
    assert len(facts.untrained) == 4
    # Without the setting, the last layer that occurs is the base's last.
    assert adapter_facts(write_peft(tmp_path / "all", tensors)).fits == ()


def test_every_naming_of_factors_by_peft(tmp_path: Path) -> None:
    prefix = "base_model.model.model"
    tensors = {
        f"{prefix}.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 8),
        f"{prefix}.layers.0.self_attn.q_proj.lora_B.default.weight": torch.ones(6, 4),
        f"{prefix}.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(6),
        f"{prefix}.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(6),
        f"{prefix}.embed_tokens.lora_embedding_A": torch.ones(2, 30),
        f"{prefix}.embed_tokens.lora_embedding_B": torch.ones(8, 2),
    }
    facts = adapter_facts(write_peft(tmp_path / "peft", tensors))
    assert facts.modules["q_proj"].shapes == ((6, 8),)
    assert facts.other_modules == ("model.embed_tokens",)
    assert facts.ranks == (2, 4)
    assert facts.parameters == 32 + 24 + 6 + 6 + 60 + 16


def test_peft_files_that_are_refused(tmp_path: Path) -> None:
    tensors = peft_tensors(known("Qwen2.5-0.5B"), [0])
    with pytest.raises(InputError, match="peft_type 'IA3' is not LORA"):
        exporter.inspect(write_peft(tmp_path / "ia3", tensors, peft_type="IA3"))
    half = {name: tensor for name, tensor in tensors.items() if "v_proj.lora_B" not in name}
    with pytest.raises(InputError, match=r"lacks one of the factors of .*v_proj"):
        exporter.inspect(write_peft(tmp_path / "half", half))
    (write_peft(tmp_path / "none", tensors) / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        exporter.inspect(tmp_path / "none")
    (tmp_path / "half" / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"adapter_config\.json cannot be read"):
        exporter.inspect(tmp_path / "half")


def base_facts(path: Path) -> BaseFacts:
    facts = exporter.inspect(path).base
    assert facts is not None
    return facts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    base = write_base(tmp_path / "base", config)
    facts = base_facts(base)
    modules = linear_modules(base)
    assert (facts.family, facts.layers, facts.hidden, facts.vocab) == (config.model_type, 2, 48, 300)
    assert facts.bytes == (base / "model.safetensors").stat().st_size
    assert facts.rope["rope_type"] == config.rope_parameters["rope_type"]
    assert facts.rope["rope_theta"] == config.rope_parameters["rope_theta"]
    assert facts.tied is config.tie_word_embeddings
    assert set(facts.trainer_covers) == {module.rsplit(".", 1)[-1] for module in square(modules)}


def test_a_base_in_shards_that_the_trainer_cannot_train(tmp_path: Path, call: Call) -> None:
    base = write_base(tmp_path / "base", CONFIGS["mistral with wide heads"], max_shard_size="100KB")
    facts = base_facts(base)
    assert facts.shards == len(list(base.glob("*.safetensors"))) > 1
    assert facts.trainer_covers == ()
    assert "no linear layer is square, so such a base cannot be trained with it" in call("inspect", base).stdout


def artifact_facts(path: Path) -> ArtifactFacts:
    facts = exporter.inspect(path).artifact
    assert facts is not None
    return facts


def test_an_artifact(tmp_path: Path, call: Call) -> None:
    spec = Rope2DSpec(8, (5, 6, 7), 256, "right")
    path = write_artifact(tmp_path / "merged", spec, parity={"max_abs_diff": 1e-6})
    facts = artifact_facts(path)
    assert facts.rope_2d == spec.to_dict()
    assert (facts.files, facts.bytes) == ({"model.safetensors": 5}, 5)
    assert (facts.eos_token_ids, facts.totals) == ((2, 7), None)
    assert facts.adapters[0]["file"] == "lora.pth"
    lines = call("inspect", path).stdout
    assert "frequencies 5-7 of 8" in lines
    assert "5 are rotated by position, 2 by branch, 1 by time" in lines
    assert "stride 256, align right, columnar" in lines
    assert "max_abs_diff 1e-06" in lines


def test_an_artifact_without_2d_rope(tmp_path: Path, call: Call) -> None:
    path = write_artifact(tmp_path / "merged", Rope2DSpec(8, (), visibility="isolated"))
    assert "none: all 8 frequencies are rotated by position" in call("inspect", path).stdout


def test_a_damaged_artifact(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "merged", Rope2DSpec(8, (5, 6)))
    (path / "model.safetensors").write_bytes(b"1")
    with pytest.raises(InputError, match="has 1 bytes, the manifest says 5"):
        exporter.inspect(path)


def test_the_reason_of_a_misfit_is_the_message_of_merge(call: Call) -> None:
    fit = exporter.inspect(LORA, base_model=BASE).fit
    assert fit is not None
    assert fit.fits
    other = exporter.inspect(LORA, base_model=GOLDENS / "llama_r025_right" / "base").fit
    assert other is not None
    assert not other.fits
    assert "does not fit" in str(other.reason)
    assert "missing modules model.layers.0.self_attn.k_proj" in str(other.reason)
    result = call("inspect", LORA, "--base-model", "/nowhere")
    assert result.exit_code == 3
    assert "/nowhere: it does not fit" in result.stdout
    assert "/nowhere does not exist" in result.stderr


def test_a_lora_without_some_square_layers_does_not_fit_their_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    modules = {name: shape for name, shape in square(linear_modules(base)).items() if name.endswith("q_proj")}
    fit = exporter.inspect(write_adapter(tmp_path / "lora.pth", random_adapter(modules)), base_model=base).fit
    assert fit is not None
    assert "missing modules model.layers.0.self_attn.o_proj" in str(fit.reason)


def test_unknown_paths(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(InputError) as error:
            exporter.inspect(path)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "absent")
    assert "is nothing that this tool knows" in message(tmp_path)
    assert "give its directory" in message(BASE / "model.safetensors")
    (tmp_path / "notes.pth").write_text("no", encoding="utf-8")
    assert "notes.pth is a text, not a LoRA file" in message(tmp_path / "notes.pth")
    assert "is not an adapter" in message(write_adapter(tmp_path / "state.pth", {"w": torch.ones(2)}))
    assert "has 2 .pth files" in message(tmp_path)
    shutil.copytree(BASE, tmp_path / "gpt")
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert "gpt2 has no rotary position embedding" in message(tmp_path / "gpt")


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"w": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(UnsafeInputError, match="would run"):
        exporter.inspect(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_parameters_that_need_another(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an adapter"):
        exporter.inspect(BASE, base_model=BASE)
    with pytest.raises(UsageError, match="give `base_model`"):
        exporter.inspect(LORA, revision="main")
    with pytest.raises(TypeError, match="did you mean 'base_model'"):
        exporter.inspect(LORA, base_modl=BASE)


@pytest.mark.parametrize("flags", [(LORA,), (LORA, "--base-model", BASE), (BASE,)])
def test_json_is_the_report(call: Call, flags: tuple[object, ...]) -> None:
    report = exporter.inspect(flags[0], base_model=BASE if len(flags) > 1 else None)  # type: ignore[arg-type]
    found = json.loads(call("inspect", *flags, "--json").stdout)
    assert found == json.loads(json.dumps(dataclasses.asdict(report)))


def test_lines_are_aligned_and_repeated_labels_left_out() -> None:
    rows = [("a", "1"), ("a", "2"), ("long", "3")]
    assert aligned(rows) == ["  a     1", "        2", "  long  3"]
    assert (spans([5, 6, 7]), spans([7, 5]), spans([3, 4])) == ("5-7", "7, 5", "3, 4")


def test_an_adapter_without_decoder_layers_fits_nothing() -> None:
    assert fitting_bases("peft", {}, 0) == ()


def test_a_regular_expression_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    tensors = peft_tensors(known("Qwen2.5-0.5B"), [0])
    slow = write_peft(tmp_path / "peft", tensors, alpha_pattern={"([a-z._0-9]|[a-z.]|[a-z])+[A-Z]": 4})
    with pytest.raises(InputError, match=r"adapter_config\.json: the regular expression .* takes too long"):
        exporter.inspect(slow)


def test_a_tied_base_whose_head_differs_does_not_fit(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["qwen2 with linear rope"])
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, base / "model.safetensors")
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    fit = exporter.inspect(lora, base_model=base).fit
    assert fit is not None
    assert "lm_head.weight differs from model.embed_tokens.weight" in str(fit.reason)
