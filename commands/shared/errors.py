"""How the command line ends: every error is one sentence on standard error and a documented exit code."""

import os
import sys
from typing import Any, NoReturn

import click

from pos2d.commands.shared.flags import in_terms_of_flags
from pos2d.errors import Pos2DError

EXIT_CODES = (
    "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 bad or mismatching input, "
    "4 unsafe input, 5 disk or I/O, 6 the output exists or is in use, 7 verification failed, "
    "130 interrupted, 141 standard output was closed, 143 terminated."
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
            # The reader of standard output has left; flushing it again at exit would only raise the same error.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            raise click.exceptions.Exit(CLOSED_PIPE) from None
        except Pos2DError as error:
            fail(in_terms_of_flags(str(error)), error.exit_code)
        except KeyboardInterrupt as interrupt:
            fail(_with_notes("interrupted", interrupt), 130)
        except SystemExit as end:
            if end.code != TERMINATED:
                raise
            fail(_with_notes("terminated", end), TERMINATED)
        except OSError as error:
            fail(f"{error.filename or 'a file'}: {error.strerror or error}", 5)
        except Exception as error:
            if os.environ.get("POS2D_TRACEBACK"):
                raise
            kind = type(error).__name__
            fail(f"internal error: {kind}: {error}. Set POS2D_TRACEBACK=1 for the traceback, and report it", 1)


def _with_notes(message: str, error: BaseException) -> str:
    """``message`` and what the library noted on ``error``, such as how to continue."""
    return in_terms_of_flags("; ".join([message, *getattr(error, "__notes__", [])]))


def fail(message: str, exit_code: int) -> NoReturn:
    """One line on standard error, then leave with ``exit_code``."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(exit_code)
