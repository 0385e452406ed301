"""Help pages whose options stand in sections."""

from typing import Any

import click

# Keeps a flag on one line while click wraps a text; it is a plain hyphen again in the page.
NO_BREAK_HYPHEN = "\u2011"


class SectionedOption(click.Option):
    """An option that names the section of the help page that it belongs to."""

    def __init__(self, *arguments: Any, section: str | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help page has a section for each kind of option; options without one come first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                name, text = record
                section = getattr(parameter, "section", None) or "Options"
                sections.setdefault(section, []).append((name, text.replace("-", NO_BREAK_HYPHEN)))
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace(NO_BREAK_HYPHEN, "-")
