"""Options of the command line that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pos2d.dtypes import DTYPES

Command = Callable[..., Any]


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def whole_numbers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """``1,8,16``."""
    try:
        return tuple(int(part) for part in value.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter(f"{value!r} must be whole numbers, such as 1,8,16") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
output_option = click.option("-o", "--output", required=True, metavar="OUT", help="Directory to write.")
force_option = click.option("--force", is_flag=True, help="Replace an artifact that stands at OUT.")
revision_option = click.option("--revision", metavar="COMMIT", help="Of a Hub id: a commit, tag or branch.")


dtype_choice = click.Choice(["auto", *DTYPES])
shard_option = click.option("--max-shard-size", metavar="5GB", help="Of every file of weights.")

quantising_options = with_options(
    click.option(
        "--quant",
        type=click.Choice(["none", "int8", "int4", "auto", "8bit", "nf4"]),
        callback=lambda _context, _option, value: None if value == "none" else value,
        help="Of onnx: int8, int4, or auto, which fills --target-size; of bnb: 8bit or nf4.",
    ),
    click.option(
        "--block-size",
        type=int,
        help="Of onnx: inputs that share a scale: 16, 32, 64, 128 or 256.  [default: 128 for calibrated int4, else 32]",
    ),
    click.option(
        "--skip-modules",
        metavar="NAMES",
        help="Linear layers that are not quantised, by name (model.layers.0), or by its end (down_proj).  "
        "[default: lm_head of bnb, none of onnx]",
    ),
    click.option(
        "--float-activations",
        default="",
        metavar="NAMES",
        help="Of onnx: 4-bit layers whose inputs are not rounded to 8 bits: slower, for models that verify refuses.",
    ),
    click.option(
        "--target-size", metavar="90MB", help="Of auto: what the weights may take; 8 bits go where 4 cost most."
    ),
)

loading_options = with_options(
    click.option("--quant", type=click.Choice(["8bit", "nf4"]), help="Quantise a merged artifact while it is loaded."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1 or mps; of ONNX artifacts cpu, which is auto, or cuda for float16 ones "
        "(never tried).",
    ),
    click.option(
        "--dtype",
        type=dtype_choice,
        default="auto",
        show_default=True,
        help="Type to compute in; auto is the stored one, which ONNX artifacts keep, and bfloat16 for 8 bits on a CPU.",
    ),
    click.option(
        "--int8-kernel",
        type=click.Choice(["auto", "bnb", "weight-only"]),
        default="auto",
        show_default=True,
        help="Of 8 bits: weight-only leaves activations as they are, bnb quantises them too.",
    ),
    click.option(
        "--attn-implementation",
        type=click.Choice(["sdpa", "eager"]),
        default="sdpa",
        show_default=True,
        help="torch's fused attention, or plain products.",
    ),
    click.option("--device-map", type=click.Choice(["auto"]), help="Spread the layers over all cards and the CPU."),
    click.option("--max-memory", metavar="0=8GB,cpu=16GB", help="Of --device-map: what each device may take."),
)


sampling_options = with_options(
    click.option(
        "--preset",
        type=click.Choice(["factual", "creative", "code", "chat", "translate"]),
        help="Options for a purpose; --list-presets shows them, and flags of their own win.",
    ),
    click.option("-n", "--max-new-tokens", type=int, help="For each prompt.  [default: 256, or the artifact's]"),
    click.option("--min-new-tokens", type=int, help="So many before an end token may come."),
    click.option(
        "--temperature",
        "--temp",
        "temperature",
        type=float,
        help="0 is greedy.  [default: the artifact's generation settings, else 0]",
    ),
    click.option("--top-k", type=int, help="Draw only from so many of the likeliest tokens; 0 is all."),
    click.option("--top-p", type=float, help="Draw only from the likeliest that have this probability together."),
    click.option("--min-p", type=float, help="Draw only what is so many times as likely as the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1, tokens that were there become less likely."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End an answer before this text; repeat it for several."
    ),
    click.option(
        "--end-token", multiple=True, metavar="TOKEN", help="A token that ends answers too, such as <|eot_id|>."
    ),
    click.option("--seed", type=int, help="Of the draws.  [default: 0]"),
    click.option("--logprobs", is_flag=True, help="With JSON: the log probability of every token."),
)

place_options = with_options(
    click.option(
        "--visibility",
        type=click.Choice(["columnar", "isolated"]),
        help="columnar: prompts see each other's earlier columns, as trained; isolated: each is answered as if alone.  "
        "[default: the artifact's]",
    ),
    click.option(
        "--align-to",
        type=click.Choice(["left", "right"]),
        help="Where prompts of different length line up.  [default: the artifact's]",
    ),
    click.option("--branch-stride", type=int, help="Branch value between neighbours.  [default: the artifact's]"),
)
layout_options = with_options(
    place_options,
    click.option(
        "--max-branches",
        type=int,
        help="Prompts of one sequence; more wait for the next, over the same context.  [default: 16]",
    ),
)


def adapter_options(required: bool) -> Callable[[Command], Command]:
    """The flags that name a base, its adapters and the positions of their training."""
    return with_options(
        click.option(
            "--base-model",
            required=required,
            metavar="DIR_OR_HUB_ID",
            help="The model that the adapter was trained on.",
        ),
        revision_option,
        click.option(
            "--lora",
            "--lora-path",
            "lora",
            required=required,
            multiple=True,
            metavar="PATH[=WEIGHT]",
            help="The trainer's .pth or a PEFT directory. Repeat it to add several, each with its weight.",
        ),
        click.option(
            "--rope-2d-ratio",
            type=float,
            help="Share of the frequencies that turn with branch and time.  [default: 0.5]",
        ),
        click.option("--pair-indices", metavar="5,6,7,8", help="These frequencies instead of a ratio, counted from 1."),
        click.option("--no-patch-rope", is_flag=True, help="The adapter was trained without 2D RoPE."),
        click.option(
            "--branch-stride", type=int, default=128, show_default=True, help="Branch value between neighbours."
        ),
        click.option(
            "--align-to",
            type=click.Choice(["left", "right"]),
            default="left",
            show_default=True,
            help="Where prompts of different length line up.",
        ),
        click.option("--lora-rank", type=int, help="Refuse an adapter of another rank."),
    )


def text_or_file(_ctx: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """``@FILE`` stands for what is in the file."""
    from pos2d.errors import InputError

    if value is None or not value.startswith("@"):
        return value
    try:
        text = Path(value[1:]).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{value[1:]} cannot be read as text: {error}") from None
    if not text.strip():
        raise InputError(f"{value[1:]} is empty; leave it out, or put some text there")
    return text
