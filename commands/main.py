"""The command line: a group that imports a verb when it is called, and ``main``.

Exit codes are documented in :data:`pos2d.commands.shared.errors.EXIT_CODES`.
"""

import atexit
import gc
import signal
import sys
from importlib import import_module

import click

from pos2d import __version__
from pos2d.commands.shared.errors import EXIT_CODES, TERMINATED, ErrorsToExitCodes
from pos2d.commands.shared.progress_bars import progress_display
from pos2d.commands.shared.streams import prepare_streams
from pos2d.progress import show_with

# Commands by workflow, with the lines that the top-level help shows: it imports none of their modules.
WORKFLOWS = {
    "Look first": {
        "doctor": "Show what this machine has, and what is missing.",
        "inspect": "Explain an adapter, a base model or an artifact.",
        "plan": "Show what each format needs, and recommend one.",
    },
    "Make an artifact": {
        "merge": "Merge adapters into a base model, as a Hugging Face directory.",
        "export": "Write ONNX graphs, a checkpoint, or a GGUF file.",
    },
    "Use an artifact": {
        "run": "Answer prompts, or chat.",
        "batch": "Answer every line of a file.",
        "serve": "Answer requests over HTTP.",
        "show-layout": "Draw branch and time of tokens, and what one attends to.",
    },
    "Check an artifact": {
        "verify": "Check files and logits of an artifact: pass or fail.",
        "eval": "Measure quality: perplexity, and KL from a reference.",
        "compare": "Say where a merge or an export went wrong.",
        "bench": "Measure speed and memory.",
    },
    "Publish an artifact": {
        "push": "Publish an artifact on the Hugging Face Hub.",
    },
}
COMMANDS = tuple(command for commands in WORKFLOWS.values() for command in commands)
# The function of a command has the name of its module; most are the command's own.
MODULES = {"eval": "evaluate", "show-layout": "show_layout"}


class Verbs(ErrorsToExitCodes):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_of(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for workflow, commands in WORKFLOWS.items():
            with formatter.section(workflow):
                formatter.write_dl(list(commands.items()))


def command_of(name: str) -> click.Command:
    """Import a command."""
    module = MODULES.get(name, name)
    command: click.Command = getattr(import_module(f"pos2d.commands.{module}"), module)
    return command


def dashes(name: str) -> str:
    """Accept underscores in flags, as the trainer writes them."""
    return name.replace("_", "-")


@click.group(
    cls=Verbs,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": dashes, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="pos2d")
def cli() -> None:
    """Merge a LoRA adapter into its base model; export, check and run the result.

    For adapters that were trained with the 2D RoPE of ParallelMind, where every token has a branch and a time as well
    as a position, and for ordinary ones. An artifact is a directory that merge or export wrote, and a MODEL
    is an artifact or any Hugging Face model: a directory, or NAME@REVISION on the Hub.
    """


def main() -> None:
    prepare_streams()
    # A terminated run leaves through its finally blocks, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, _leave)
    # So does one whose terminal is closed, unless nohup keeps that from it; Windows has no such signal.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _leave)
    # What torch imports, hundreds of thousands of objects, stays until the process dies with it: looking through it for
    # garbage while it comes takes a tenth of a second, and once more at the end half of one.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    show_with(progress_display)
    cli()


def _leave(*_: object) -> None:
    sys.exit(TERMINATED)
