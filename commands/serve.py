"""``pos2d serve``: its flags, its call, and the line that says where it answers."""

from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import FROM_BASE, context_flag, flags_of
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import warn
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.text.options import ContextOptions
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedFrequencies

if TYPE_CHECKING:
    from pos2d.runtime.serve import Serving


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@flags_of(ServeOptions, "Server")
@context_flag
@flags_of(ContextOptions, "Options")
@flags_of(LoadOptions, "Loading")
@flags_of(BaseOptions, FROM_BASE)
@flags_of(TrainedFrequencies, FROM_BASE)
def serve(**flags: Any) -> None:
    """Answer requests over HTTP with a MODEL, for the clients of OpenAI's API.

    MODEL is an artifact, or a plain model: a Hugging Face directory, or NAME@REVISION on the Hugging Face Hub. With
    --base-model and --lora in its place, adapters are added to their base in memory, and nothing is written.

    On SIGTERM or Ctrl-C the server admits no request any more, finishes those that run, and ends with exit code 0; a
    second signal ends it at once. Needs the packages of pip install pos2d[serve].
    """
    from pos2d import runtime

    def show(serving: "Serving") -> None:
        warn(serving.warnings, serving.notes)
        click.echo(f"ready at {serving.url}", err=True)

    runtime.serve(on_ready=show, **flags)
