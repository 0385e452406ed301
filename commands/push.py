"""``pos2d push``: its flags, its call, and how its report is shown."""

import sys
from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import flags_of, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show, warn
from pos2d.commands.shared.tables import table
from pos2d.exporter.push import PushOptions
from pos2d.units import size_text

if TYPE_CHECKING:
    from pos2d.exporter.push import PushReport


@click.command(cls=SectionedCommand)
@click.argument("artifact")
@click.argument("repo")
@flags_of(PushOptions, "Options")
@json_flag
def push(as_json: bool, **flags: Any) -> None:
    """Publish an ARTIFACT on the Hugging Face Hub, as the repository REPO: ORG/NAME.

    Every file is compared with its hash first. What the manifest lists is sent, with the manifest and the model card,
    in one commit: either all files are there, or none. Other files in the directory are not sent. The same command
    continues an interrupted upload. Files of an artifact that was there before are deleted if this one does not have
    them.

    The token is that of `hf auth login`, or HF_TOKEN; it needs write access. HF_ENDPOINT names another Hub.
    """
    from pos2d import exporter

    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    report = exporter.push(**flags)
    warn(report.warnings)
    show(report, as_json, report_text(report))


def report_text(report: "PushReport") -> str:
    """The files of a dry run, then one line."""
    if not report.dry_run:
        return report.summary()
    rows = [(file.name, size_text(file.bytes), "large file" if file.large else "in git") for file in report.files]
    return "\n".join([table(("file", "size", "stored as"), rows), f"message: {report.message}", report.summary()])
