"""How the command line ends: every error is one sentence on standard error and a documented exit code."""

import os
import sys
from typing import Any, NoReturn

import click

from pos2d.errors import Pos2DError

EXIT_CODES = (
    "Exit codes: 0 done, 1 a defect of ours, 2 usage, 3 bad or mismatching input, 4 unsafe input, 5 disk or I/O, "
    "6 output exists or is busy, 7 verification failed, 130 interrupted, 141 the output was closed, 143 terminated."
)
TERMINATED, CLOSED_PIPE = 143, 141


class ErrorsToExitCodes(click.Group):
    """Turns every error into one sentence and its documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # Nobody reads any more, and nobody needs to hear of it; nor may the end of the program try again.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            raise click.exceptions.Exit(CLOSED_PIPE) from None
        except Pos2DError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt as interrupt:
            fail("; ".join(["interrupted", *getattr(interrupt, "__notes__", [])]), 130)
        except SystemExit as end:
            if end.code != TERMINATED:
                raise
            fail("; ".join(["terminated", *getattr(end, "__notes__", [])]), TERMINATED)
        except OSError as error:
            fail(f"{error.filename or 'a file'}: {error.strerror or error}", 5)
        except Exception as error:
            if os.environ.get("POS2D_TRACEBACK"):
                raise
            kind = type(error).__name__
            fail(f"a defect of ours: {kind}: {error}. Set POS2D_TRACEBACK=1 for the traceback and report it", 1)


def fail(message: str, exit_code: int) -> NoReturn:
    """One line on standard error, then leave with ``exit_code``."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(exit_code)
