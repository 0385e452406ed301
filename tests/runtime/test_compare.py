"""``compare``: every planted fault is named, and nothing is said against artifacts that are right."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pos2d import exporter, runtime
from pos2d.errors import UsageError
from pos2d.manifest import read_manifest
from pos2d.runtime.comparison.faults import faults_of_graph
from pos2d.runtime.comparison.positions import compare_positions, compare_sizes
from pos2d.runtime.comparison.report import ArtifactReport
from pos2d.runtime.opening.opened_model import open_model
from tests.bases import CONFIGS, SHAPE, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer

# nf4 takes multiples of 64 inputs and 32 outputs.
CONFIG = LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 128})
STOP, END = "<|end|>", 256
SHORT: dict[str, Any] = {"max_new_tokens": 6, "branches": 2}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """A base with a tokenizer, a PEFT adapter and the trainer's for it."""

    root: Path
    base: Path
    peft: Path
    trainer: Path

    def plain(self, name: str, source: Path | None = None) -> Path:
        """A copy of a directory, which is the base unless another is given."""
        return shutil.copytree(source or self.base, self.root / name)

    def rewritten(self, name: str, change: Callable[[Tensors], None], source: Path | None = None) -> Path:
        """A copy whose weights are changed."""
        copy = self.plain(name, source)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy


def write_settings(directory: Path, ends: list[int]) -> None:
    settings = json.dumps({"eos_token_id": ends})
    (directory / "generation_config.json").write_text(settings, encoding="utf-8")


# peft asks transformers for a property that has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("compare")
    base = write_base(root / "base", CONFIG)
    write_tokenizer(base, chat=True, special=[STOP])
    write_settings(base, [2, END])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(root / "peft")
    place = Place(root, base, root / "peft", write_adapter(root / "lora.pth", random_adapter(linear_modules(base))))
    merged = place.plain("merged by PEFT")
    model.merge_and_unload().save_pretrained(merged)
    write_settings(merged, [2, END])
    return place


def by_name(report: Any) -> Mapping[str, ArtifactReport]:
    return {Path(artifact.figures.name).name: artifact for artifact in report.artifacts}


def twice(base: Tensors, tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] += tensors[name] - base[name]


def first_layer_of(base: Tensors, tensors: Tensors) -> None:
    for name in tensors:
        if ".layers.0." in name:
            tensors[name] = base[name]


def halved(base: Tensors, tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = (tensors[name] + base[name]) / 2


def moved(tensors: Tensors) -> None:
    """As another adapter moves them: all linear layers, and nothing else."""
    torch.manual_seed(3)
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] += tensors[name].std() * 0.1 * torch.randn_like(tensors[name])


def padded(place: Place, merged: Path) -> Path:
    """With further rows of embedding and head, as tools add them for speed."""

    def pad(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(20, CONFIG.hidden_size)])

    directory = place.rewritten("padded", pad, merged)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 320}), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def plain(place: Place) -> Mapping[str, ArtifactReport]:
    """What is said of directories that another tool merged."""
    merged, base = place.root / "merged by PEFT", load_file(place.base / "model.safetensors")
    template = place.plain("template", merged)
    settings = json.loads((template / "tokenizer_config.json").read_text(encoding="utf-8"))
    changed = settings | {"chat_template": settings["chat_template"].replace("<assistant>", "<bot>")}
    (template / "tokenizer_config.json").write_text(json.dumps(changed), encoding="utf-8")
    stop = place.plain("stop", merged)
    write_settings(stop, [2])
    no_tokenizer = place.plain("no tokenizer", merged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (no_tokenizer / name).unlink()
    rope = place.plain("rope", merged)
    config = json.loads((rope / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = 5000.0
    (rope / "config.json").write_text(json.dumps(config), encoding="utf-8")
    other = write_base(place.root / "other base", CONFIG, seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(place.base / name, other / name)
    small = write_base(place.root / "other sizes", LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    report = runtime.compare(
        [
            merged,
            place.plain("never"),
            padded(place, merged),
            place.rewritten("twice", lambda tensors: twice(base, tensors), merged),
            place.rewritten("half", lambda tensors: first_layer_of(base, tensors), merged),
            place.rewritten("weak", lambda tensors: halved(base, tensors), merged),
            place.rewritten("stranger", moved),
            other,
            small,
            template,
            stop,
            no_tokenizer,
            rope,
        ],
        base_model=place.base,
        lora=place.peft,
        **SHORT,
    )
    return by_name(report)


@pytest.mark.parametrize(
    ("name", "cause", "words"),
    [
        ("merged by PEFT", "none", "nothing is wrong"),
        ("never", "adapter not in effect", "not in effect"),
        ("padded", "none", "nothing is wrong"),
        ("twice", "adapter applied twice", "2.00 times"),
        ("half", "part of the adapter", "layers 0"),
        ("weak", "adapter strength", "0.50 of its strength"),
        ("stranger", "other adapter", "not by this adapter"),
        ("other base", "other base", "another base"),
        ("other sizes", "other base", "another base"),
        ("template", "chat template", "<bot>"),
        ("stop", "end tokens", STOP),
        ("no tokenizer", "tokenizer", "none"),
        ("rope", "positions", "rope_theta"),
    ],
)
def test_a_fault_of_another_tool_is_named(
    plain: Mapping[str, ArtifactReport], name: str, cause: str, words: str
) -> None:
    verdict = plain[name].verdict
    assert verdict.causes[0] == cause, verdict
    assert words in verdict.sentence
    assert len(verdict.causes) == 1 or name in ("other sizes", "no tokenizer"), verdict
    assert verdict.level == ("fine" if cause == "none" else "fault")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_directory_that_transformers_saved_again_is_the_same(tmp_path: Path, family: str) -> None:
    base = write_base(tmp_path / "base", CONFIGS[family])
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    reference, again = (open_model(tmp_path / name) for name in ("base", "again"))
    assert compare_sizes(reference, again) == ""
    assert compare_positions(reference, again) == ""


def test_the_unmerged_model_is_the_merged_one(plain: Mapping[str, ArtifactReport]) -> None:
    figures = plain["merged by PEFT"].figures
    for distance in (figures.one_branch, figures.columns):
        assert distance is not None
        assert distance.mean_kl < 1e-9
        assert distance.top1_agreement == 1
    assert not plain["merged by PEFT"].partings
    assert plain["never"].figures.one_branch.mean_kl > 1e-3  # type: ignore[union-attr]


def test_positions_and_quantised_artifacts(place: Place) -> None:
    made: dict[str, Any] = {"base_model": place.base, "lora": place.trainer}
    positions: dict[str, Any] = {"rope_2d_ratio": 0.5, "branch_stride": 128}
    merge = exporter.merge
    root = place.root
    merge(output=root / "good", **made, **positions)
    merge(output=root / "ratio", **made, **positions | {"rope_2d_ratio": 1.0})
    merge(output=root / "stride", **made, **positions | {"branch_stride": 64})
    merge(output=root / "bare", **made, no_patch_rope=True)
    exporter.export(root / "good", root / "onnx", no_verify=True)
    exporter.export(root / "good", root / "int8", quant="int8", no_verify=True, no_calibration=True)
    exporter.export(root / "good", root / "nf4", format="bnb", quant="nf4", skip_modules="lm_head")
    exporter.export(root / "good", root / "stock", format="stock")
    untrained = {name: torch.zeros_like(tensor) for name, tensor in torch.load(place.trainer).items()}
    merge(output=root / "zero", base_model=place.base, lora=write_adapter(root / "zero.pth", untrained), **positions)
    exporter.export(root / "zero", root / "zero-onnx", no_verify=True)
    # As a graph of which the manifest says what it should be, so that logits alone tell.
    unlike, right = (json.loads((root / name / "manifest.json").read_text()) for name in ("zero-onnx", "onnx"))
    (root / "zero-onnx" / "manifest.json").write_text(json.dumps(unlike | {"adapters": right["adapters"]}))
    names = ("good", "ratio", "stride", "bare", "onnx", "int8", "nf4", "stock", "zero", "zero-onnx")
    report = runtime.compare([root / name for name in names], plot=root / "steps.svg", **made, **positions, **SHORT)
    found = {name: artifact.verdict.causes for name, artifact in by_name(report).items()}
    assert found == {
        "good": ("none",),
        "ratio": ("positions",),
        "stride": ("positions",),
        "bare": ("positions",),
        "onnx": ("none",),
        "int8": ("quantisation",),
        "nf4": ("quantisation",),
        "stock": ("none",),
        "zero": ("adapter not in effect",),
        "zero-onnx": ("adapter not in effect",),
    }
    figures = {name: artifact.figures for name, artifact in by_name(report).items()}
    assert figures["stride"].one_branch.mean_kl < 1e-9 < figures["stride"].columns.mean_kl  # type: ignore[union-attr]
    assert figures["stock"].columns is None
    right_manifest = read_manifest(root / "onnx")
    (adapter,) = right_manifest.adapters
    for wrong, strength, cause in (
        ({"adapters": ()}, None, "adapter not in effect"),
        ({"adapters": ({**adapter, "weight": 2.0},)}, 1.6, "adapter applied twice"),
        ({"adapters": ({**adapter, "sha256": "other"},)}, 0.1, "other adapter"),
        ({"base": {**right_manifest.base, "config_sha256": "other"}}, None, "other base"),
        ({}, 0.5, "part of the adapter"),
    ):
        found_manifest = replace(right_manifest, **wrong)
        assert [fault.cause for fault in faults_of_graph(right_manifest, found_manifest, strength, True)] == [cause]
    # The same adapter in another file.
    same = replace(right_manifest, adapters=({**adapter, "sha256": "other"},))
    assert not faults_of_graph(right_manifest, same, 1.02, False)
    picture = (root / "steps.svg").read_text(encoding="utf-8")
    assert picture.count("<polyline") == len(names)


def test_a_change_below_the_steps_of_bfloat16_is_named(tmp_path: Path, place: Place) -> None:
    base = tmp_path / "bfloat16"
    shutil.copytree(place.base, base)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    exporter.merge(base, f"{place.peft}=0.005", tmp_path / "weak", dtype="auto")
    exporter.merge(base, f"{place.peft}=0.005", tmp_path / "float32", dtype="float32")
    exporter.merge(base, place.peft, tmp_path / "strong", dtype="auto")
    merged_file = tmp_path / "weak" / "model.safetensors"
    weak = runtime.compare(
        [tmp_path / "weak", tmp_path / "float32"], base_model=base, lora=f"{place.peft}=0.005", **SHORT
    )
    lost, kept = (artifact.verdict for artifact in weak.artifacts)
    assert (lost.causes, lost.level) == (("rounding",), "fault")
    assert "bfloat16 lost" in lost.sentence
    assert kept.causes == ("none",)
    # A base in float32 that was rounded before an adapter was added.
    early = place.rewritten("rounded early", lambda tensors: tensors.update(load_file(merged_file)))
    assert by_name(runtime.compare(early, base_model=place.base, lora=f"{place.peft}=0.005", **SHORT))[
        "rounded early"
    ].verdict.causes == ("rounding",)
    (strong,) = runtime.compare(tmp_path / "strong", base_model=base, lora=place.peft, **SHORT).artifacts
    assert (strong.verdict.causes, strong.verdict.level) == (("rounding",), "cost")


def test_the_command_ends_with_the_code_of_verify(place: Place, call: Callable[..., Result]) -> None:
    flags = ("--base-model", place.base, "--lora", place.peft, "--branches", 1, "--max-new-tokens", 4)
    wrong = call("compare", place.base, *flags)
    assert wrong.exit_code == 7
    assert "not in effect" in wrong.stdout
    right = call("compare", place.root / "merged by PEFT", "--json", "-p", "What is tea?", *flags)
    assert right.exit_code == 0
    report = json.loads(right.stdout)
    assert report["artifacts"][0]["verdict"]["level"] == "fine"
    assert len(report["artifacts"][0]["kl_by_step"]) == len(report["answers"][0]) or report["answers"]


def test_what_other_engines_run_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 6, "kind": "gguf"}', encoding="utf-8")
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        runtime.compare(tmp_path, base_model=place.base, lora=place.peft)
