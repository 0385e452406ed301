"""Plant faults in merges and exports of the demo model, and print what ``compare`` says about each.

``python benchmarks/compare_faults.py`` needs demo/base (``make demo``), 15 GB of disk space and some minutes.
It ends with exit code 1 if a fault is missed, or if something is said against an artifact that is right.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file

from pos2d import exporter, runtime

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "examples" / "demo_adapter" / "lora.pth"
HELD_OUT = ROOT / "examples" / "demo_data" / "held_out.jsonl"
POSITIONS: Mapping[str, Any] = {"rope_2d_ratio": 1.0, "branch_stride": 128}
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """An artifact, and the cause that ``compare`` should name first."""

    what: str
    path: Path
    cause: str


@click.command()
@click.option("--base", type=click.Path(path_type=Path), default=ROOT / "demo" / "base", show_default=True)
@click.option("--lines", default=16, show_default=True, help="Lines of the held-out questions that are read.")
def bench(base: Path, lines: int) -> None:
    """Print a table in Markdown, and every sentence."""
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        text = place / "text.jsonl"
        text.write_text("\n".join(HELD_OUT.read_text(encoding="utf-8").splitlines()[:lines]), encoding="utf-8")
        click.echo("| artifact | named | KL | KL, 4 columns | top-1 | sentence |\n|---|---|---|---|---|---|")
        for cases, reference in (of_columns(base, place), of_bfloat16(base, place), of_peft(base, place)):
            report = runtime.compare([case.path for case in cases], text=text, max_new_tokens=24, **reference)
            for case, artifact in zip(cases, report.artifacts, strict=True):
                click.echo(row(case, artifact))
                missed += artifact.verdict.causes[0] != case.cause
            effect = report.base.one_branch
            click.echo(f"| (the base itself) | | {effect.mean_kl if effect else 0:.2g} | | | |")
    sys.exit(1 if missed else 0)


def row(case: Case, artifact: Any) -> str:
    figures, verdict = artifact.figures, artifact.verdict
    one, columns = figures.one_branch, figures.columns
    named = ", ".join(verdict.causes) + ("" if verdict.causes[0] == case.cause else f" INSTEAD OF {case.cause}")
    kl = [f"{distance.mean_kl:.2g}" if distance else "-" for distance in (one, columns)]
    top1 = f"{one.top1_agreement:.1%}" if one else "-"
    return f"| {case.what} | {named} | {' | '.join(kl)} | {top1} | {verdict.sentence} |"


def of_columns(base: Path, place: Path) -> tuple[list[Case], dict[str, Any]]:
    """The demo's own adapter, with 2D RoPE."""

    def merged(name: str, *, base_model: Path = base, lora: str | Path = ADAPTER, **options: Any) -> Path:
        exporter.merge(base_model, lora, place / name, **{**POSITIONS, **options})
        return place / name

    def adapter(name: str, keep: Callable[[str], bool]) -> Path:
        factors = torch.load(ADAPTER, weights_only=True)
        changed = {key: value if keep(key) else torch.zeros_like(value) for key, value in factors.items()}
        torch.save(changed, place / f"{name}.pth")
        return place / f"{name}.pth"

    good = merged("good")
    exports: dict[str, dict[str, Any]] = {
        "onnx": {"no_verify": True},
        "int8": {"quant": "int8", "no_verify": True, "no_calibration": True},
        "int4": {"quant": "int4", "no_verify": True, "no_calibration": True},
        "nf4": {"format": "bnb", "quant": "nf4"},
        "8bit": {"format": "bnb", "quant": "8bit"},
        "stock": {"format": "stock"},
    }
    for name, options in exports.items():
        exporter.export(good, place / name, **options)
    first_half = adapter("half", lambda key: int(key.split(".layers.")[1].split(".")[0]) < 15)
    cases = [
        Case("merged", good, "none"),
        Case("ONNX float32", place / "onnx", "none"),
        Case("ONNX int8, not calibrated", place / "int8", "quantisation"),
        Case("ONNX int4, not calibrated", place / "int4", "quantisation"),
        Case("bitsandbytes 8bit", place / "8bit", "quantisation"),
        Case("stock", place / "stock", "none"),
        Case("merged in bfloat16", merged("bfloat16", dtype="bfloat16"), "rounding"),
        Case(
            "**adapter never applied**", merged("never", lora=adapter("zero", lambda _: False)), "adapter not in effect"
        ),
        Case("**applied twice**", merged("twice", lora=f"{ADAPTER}=2"), "adapter applied twice"),
        Case("**wrong ratio**", merged("ratio", rope_2d_ratio=0.5), "positions"),
        Case("**wrong stride**", merged("stride", branch_stride=256), "positions"),
        Case("**half of the layers**", merged("half", lora=first_half), "part of the adapter"),
        Case("**nf4**", place / "nf4", "quantisation"),
        Case("**another chat template**", merged("template", base_model=with_template(base, place)), "chat template"),
        Case("**a missing stop token**", merged("stop", base_model=without_stop(base, place)), "end tokens"),
        Case("**another base**", merged("other", base_model=other_base(base, place)), "other base"),
    ]
    return cases, {"base_model": base, "lora": ADAPTER, **POSITIONS}


def of_bfloat16(base: Path, place: Path) -> tuple[list[Case], dict[str, Any]]:
    """A weak adapter on a base in bfloat16."""
    half = copied(base, place / "base-bfloat16")
    rewrite(half, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    weak = f"{ADAPTER}=0.03"
    for name, dtype in (("dead-zone", "auto"), ("kept", "float32")):
        exporter.merge(half, weak, place / name, dtype=dtype, **POSITIONS)
    cases = [
        Case("**bfloat16 dead zone**", place / "dead-zone", "rounding"),
        Case("the same in float32", place / "kept", "none"),
    ]
    return cases, {"base_model": half, "lora": weak, **POSITIONS}


def of_peft(base: Path, place: Path) -> tuple[list[Case], dict[str, Any]]:
    """The same factors as an ordinary LoRA of PEFT, merged by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def model_in(dtype: torch.dtype) -> Any:
        factors = torch.load(ADAPTER, weights_only=True)
        settings = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), settings)
        names = {
            f"base_model.model.{k.replace('.lora.A.', '.lora_A.default.').replace('.lora.B.', '.lora_B.default.')}": v
            for k, v in factors.items()
        }
        model.load_state_dict(names, strict=False)
        return model

    model_in(torch.float32).save_pretrained(place / "peft")
    cases = []
    for name, dtype, cause in (("float32", torch.float32, "none"), ("bfloat16", torch.bfloat16, "rounding")):
        target = copied(base, place / f"peft-{name}")
        model_in(dtype).merge_and_unload().save_pretrained(target)
        shutil.copyfile(base / "generation_config.json", target / "generation_config.json")
        cases.append(Case(f"PEFT, merged by PEFT in {name}", target, cause))
    return [*cases, Case("PEFT, **never applied**", base, "adapter not in effect")], {
        "base_model": base,
        "lora": place / "peft",
    }


def copied(base: Path, target: Path) -> Path:
    return shutil.copytree(base, target)


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata={"format": "pt"})


def with_template(base: Path, place: Path) -> Path:
    """The base with a template of another model, ChatML without its default system message."""
    target = copied(base, place / "base-template")
    template = (
        "{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
    )
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return target


def without_stop(base: Path, place: Path) -> Path:
    """The base without the token that ends its answers: generation settings name the end of a text alone."""
    target = copied(base, place / "base-stop")
    path = target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": 0}), encoding="utf-8")
    return target


def other_base(base: Path, place: Path) -> Path:
    """A base of the same shape whose weights all differ by 2 %, as after another fine-tuning."""
    target = copied(base, place / "base-other")
    draw = torch.Generator().manual_seed(0)

    def moved(tensors: Tensors) -> Tensors:
        return {name: t * (1 + 0.02 * torch.randn(t.shape, generator=draw)) for name, t in tensors.items()}

    rewrite(target, moved)
    return target


if __name__ == "__main__":
    bench()
