"""Command line of the project: parse, call one function, print.

Exit codes: 0 done, 1 a defect of ours, 2 usage, 3 bad or mismatching input, 4 unsafe input, 5 disk or I/O,
6 the output exists or is busy, 7 verification failed, 130 interrupted, 141 the output was closed,
143 terminated.
"""

import atexit
import gc
import signal
import sys
from typing import Any

import click

from cli_errors import EXIT_CODES, TERMINATED, Commands
from cli_options import (
    adapter_options,
    dtype_choice,
    force_option,
    json_option,
    loading_options,
    output_option,
    quantising_options,
    revision_option,
    shard_option,
    whole_numbers,
)
from cli_report import show, warn
from cli_run import batch, run, show_layout
from pos2d import __version__


def dashes(name: str) -> str:
    """The trainer writes its flags with underscores; both forms are accepted."""
    return name.replace("_", "-")


@click.group(
    cls=Commands,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": dashes, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="pos2d")
def cli() -> None:
    """Deploy a LoRA that was trained with 2D RoPE: merge it, export it, check it, run it."""


@cli.command()
@adapter_options(required=True)
@output_option
@click.option(
    "--dtype",
    type=dtype_choice,
    default="auto",
    show_default=True,
    help="Type of the written weights; auto keeps the base's.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="stochastic keeps small changes on average where a half would swallow them.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
@shard_option
@click.option("--dry-run", is_flag=True, help="Check everything, say what is needed, write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted merge of the same inputs.")
@force_option
@json_option
def merge(as_json: bool, **flags: Any) -> None:
    """Add adapters to their base model and bake the positions.

    Ratio, stride and alignment must be those of the training; the trainer does not save them. Without --max-shard-size
    the base's files are kept.
    """
    import exporter

    report = exporter.merge(**flags)
    warn(report.warnings)
    show(report, as_json, "\n".join(report.lines()))


@cli.command()
@click.argument("merged", required=False)
@output_option
@click.option(
    "--format",
    type=click.Choice(["onnx", "bnb"]),
    default="onnx",
    show_default=True,
    help="onnx: graphs with their KV cache; bnb: a bitsandbytes checkpoint.",
)
@quantising_options
@adapter_options(required=False)
@click.option(
    "--dtype",
    type=dtype_choice,
    default="auto",
    show_default=True,
    help="Of what is not quantised, and of a graph's activations and cache: float32, or float16 for a card.",
)
@shard_option
@click.option("--no-verify", is_flag=True, help="Of onnx: skip the closing check, which is what verify does.")
@click.option("--no-calibration", is_flag=True, help="Of onnx: round every value for itself: much faster, and worse.")
@force_option
@json_option
def export(as_json: bool, **flags: Any) -> None:
    """Turn a MERGED directory into ONNX graphs that take pos2d, or into a bitsandbytes checkpoint.

    Both also start from --base-model and --lora: then the exact sum is stored or quantised, before any rounding. A
    graph of a MERGED directory is held against it before it is kept, a quantised one against float activations.
    """
    import exporter

    report = exporter.export(**flags)
    warn(report.warnings)
    show(report, as_json, report.summary())


@cli.command()
@click.argument("path")
@click.option("--base-model", metavar="DIR_OR_HUB_ID", help="Say whether the adapter fits this base.")
@revision_option
@click.option("--guess-ratio", is_flag=True, help="Find the ratio and the stride of the training, by reading --text.")
@click.option("--text", metavar="FILE", help="A few dozen lines like the training data: JSONL, or paragraphs.")
@json_option
def inspect(as_json: bool, **flags: Any) -> None:
    """Explain an adapter, a base or an artifact."""
    import exporter
    from exporter.inspection.text import inspect_lines

    report = exporter.inspect(**flags)
    show(report, as_json, "\n".join(inspect_lines(report)))
    report.raise_if_misfit()


@cli.command()
@click.argument("model", metavar="MODEL_OR_ARTIFACT")
@click.option("--gpu-memory", metavar="8GB", help="Of the card to run on.  [default: the CPU, in the free memory]")
@click.option("--branches", type=int, default=1, show_default=True, help="Prompts that are answered side by side.")
@click.option("--context", type=int, default=4096, show_default=True, help="Positions in the cache, of all branches.")
@json_option
def plan(as_json: bool, **flags: Any) -> None:
    """Say what every format of a base or an artifact needs, and which one to take; no weight is read."""
    import exporter

    report = exporter.plan(**flags)
    show(report, as_json, "\n".join(report.lines()))


@cli.command()
@click.argument("artifact")
@click.option(
    "--against",
    metavar="MERGED_OR_ONNX",
    help="The reference: another artifact of the same model. A quantised graph needs none.",
)
@click.option(
    "--rtol",
    type=float,
    default=1e-3,
    show_default=True,
    help="With --against: largest difference of a logit that passes, as a share of the largest logit.",
)
@json_option
def verify(as_json: bool, **flags: Any) -> None:
    """Compare an ARTIFACT's logits with a reference, on one branch and on several.

    A quantised graph is compared with itself, but with float activations; where it fails, the flags are named with
    which an export passes.
    """
    import runtime

    report = runtime.verify(**flags)
    lines = [
        f"{case.name}: max |d logit| {case.max_abs_diff:.2e}, top-1 {case.top1_agreement:.1%}, "
        f"KL {case.mean_kl:.1e} ({case.positions} positions)"
        for case in report.cases
    ]
    show(report, as_json, "\n".join([*lines, "passed" if report.passed else "failed"]))
    report.raise_if_failed()


@cli.command(name="eval")
@click.argument("artifact")
@click.option("--against", metavar="REF", help="Another artifact of the same model, read on the CPU in float32.")
@click.option(
    "--text",
    required=True,
    metavar="FILE",
    help="JSONL, or paragraphs. Samples are cut at 512 tokens; reading ends after 10,000 tokens.",
)
@click.option("--branches", type=int, default=4, show_default=True, help="Samples side by side; 1 leaves columns out.")
@loading_options
@json_option
def evaluate(as_json: bool, **flags: Any) -> None:
    """Perplexity of an ARTIFACT on a text, and its KL and top token against a reference.

    Samples are read one after the other, then side by side. Of a conversation the last turn is predicted, of other
    texts everything.
    """
    import runtime

    report = runtime.evaluate(**flags)
    show(report, as_json, "\n".join(report.lines()))


@cli.command()
@click.argument("artifact")
@click.option("-p", "--prompt-tokens", type=int, default=512, show_default=True, help="Random tokens that are read.")
@click.option("-g", "--new-tokens", type=int, default=64, show_default=True, help="Of every answer.")
@click.option(
    "-n",
    "--branches",
    default="1,2,4,8,16",
    show_default=True,
    callback=whole_numbers,
    help="Answers side by side over the one prompt.",
)
@click.option("-r", "--rounds", type=int, default=3, show_default=True, help="Medians are taken over them.")
@loading_options
@json_option
def bench(as_json: bool, **flags: Any) -> None:
    """Time an ARTIFACT on this machine: reading, first token, steps, memory."""
    import runtime

    report = runtime.bench(**flags)
    show(report, as_json, "\n".join(report.lines()))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, and what the tool still needs."""
    import runtime

    report = runtime.doctor()
    show(report, as_json, "\n".join(report.lines()))
    report.raise_if_unfit()


for command in (run, batch, show_layout):
    cli.add_command(command)


def main() -> None:
    # A terminated run leaves through its finally blocks, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    # What torch imports, hundreds of thousands of objects, stays until the process dies with it: looking through it for
    # garbage while it comes takes a tenth of a second, and once more at the end half of one.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    cli(prog_name=None if sys.argv[0].endswith("pos2d") else "cli.py")


if __name__ == "__main__":
    main()
