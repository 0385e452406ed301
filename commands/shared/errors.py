"""How the command line ends: every error is one sentence on standard error and a documented exit code."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from pos2d.commands.shared.flags import in_terms_of_flags
from pos2d.commands.shared.streams import STANDARD_OUTPUT, discard_output
from pos2d.errors import Pos2DError

EXIT_CODES = (
    "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 bad or mismatching input, "
    "4 unsafe input, 5 disk or I/O, 6 the output exists or is in use, 7 verification failed, "
    "8 the Hub cannot be reached or refuses, "
    "130 interrupted, 141 standard output was closed, 143 terminated."
)
TERMINATED, CLOSED_PIPE = 143, 141


class ErrorsToExitCodes(click.Group):
    """Turns every error into one sentence and its documented exit code."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with exit_codes():  # --help and --version print while the context is made
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with exit_codes():
            result = super().invoke(ctx)
            sys.stdout.flush()  # so that a full disk is noticed here
            return result


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors inside the block into one sentence and an exit code."""
    try:
        yield
    except (click.ClickException, click.Abort):
        raise
    except click.exceptions.Exit:
        with exit_codes():
            sys.stdout.flush()
        raise
    except BrokenPipeError:
        discard_output()
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
        if error.filename == STANDARD_OUTPUT:
            discard_output()
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
    with contextlib.suppress(OSError):  # standard error may be full or closed; the code still tells
        click.echo(f"error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(exit_code)
