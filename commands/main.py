"""The command line: a group that imports a verb when it is called, and ``main``.

Exit codes: 0 done, 1 a defect of ours, 2 usage, 3 bad or mismatching input, 4 unsafe input, 5 disk or I/O,
6 the output exists or is busy, 7 verification failed, 130 interrupted, 141 the output was closed,
143 terminated.
"""

import atexit
import gc
import signal
import sys
from importlib import import_module

import click

from pos2d import __version__
from pos2d.commands.shared.errors import EXIT_CODES, TERMINATED, ErrorsToExitCodes

# Verbs by workflow, each with the module of this package that holds its command.
WORKFLOWS = {
    "Before": {"doctor": "doctor", "inspect": "inspect", "plan": "plan"},
    "Make an artifact": {"merge": "merge", "export": "export"},
    "Use it": {"run": "run", "batch": "batch", "show-layout": "show_layout"},
    "Check and measure it": {"verify": "verify", "eval": "evaluate", "bench": "bench"},
}
MODULES = {verb: module for verbs in WORKFLOWS.values() for verb, module in verbs.items()}


class Verbs(ErrorsToExitCodes):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_of(cmd_name) if cmd_name in MODULES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for workflow, verbs in WORKFLOWS.items():
            with formatter.section(workflow):
                formatter.write_dl([(verb, command_of(verb).get_short_help_str(limit=200)) for verb in verbs])


def command_of(verb: str) -> click.Command:
    """Import the command of a verb."""
    module = import_module(f"pos2d.commands.{MODULES[verb]}")
    command: click.Command = getattr(module, MODULES[verb])
    return command


def dashes(name: str) -> str:
    """The trainer writes its flags with underscores; both forms are accepted."""
    return name.replace("_", "-")


@click.group(
    cls=Verbs,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": dashes, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="pos2d")
def cli() -> None:
    """Deploy a LoRA that was trained with 2D RoPE: merge it, export it, check it, run it."""


def main() -> None:
    # A terminated run leaves through its finally blocks, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    # What torch imports, hundreds of thousands of objects, stays until the process dies with it: looking through it for
    # garbage while it comes takes a tenth of a second, and once more at the end half of one.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    cli(prog_name=None if sys.argv[0].endswith("pos2d") else "cli.py")
