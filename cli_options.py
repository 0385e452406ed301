"""Options of the command line that several commands share."""

from collections.abc import Callable
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


json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
output_option = click.option("-o", "--output", required=True, metavar="OUT", help="Directory to write.")
force_option = click.option("--force", is_flag=True, help="Replace an artifact that stands at OUT.")
revision_option = click.option("--revision", metavar="COMMIT", help="Of a Hub id: a commit, tag or branch.")


dtype_choice = click.Choice(["auto", *DTYPES])
shard_option = click.option("--max-shard-size", metavar="5GB", help="Of every file of weights.")

loading_options = with_options(
    click.option("--quant", type=click.Choice(["8bit", "nf4"]), help="Quantise a merged artifact while it is loaded."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1 or mps; ONNX artifacts run on the CPU.",
    ),
    click.option(
        "--dtype",
        type=dtype_choice,
        default="auto",
        show_default=True,
        help="Type to compute in; auto is the stored one, and bfloat16 for 8 bits on a CPU.",
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
