"""The flag that prints the presets."""

from collections.abc import Mapping
from typing import Any

import click

from pos2d.commands.shared.flags import Decorator
from pos2d.commands.shared.streams import print_json, print_out
from pos2d.commands.shared.tables import table
from pos2d.runtime.engine.sampling import PRESETS


class PresetList(click.Option):
    """A flag that prints the presets, with ``--json`` as JSON, and ends the command."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        if opts.get("list_presets") and not ctx.resilient_parsing:
            print_presets(as_json=bool(opts.get("as_json")))
            ctx.exit()
        return super().handle_parse_result(ctx, opts, args)


def print_presets(as_json: bool) -> None:
    """Print every preset and the options that it sets."""
    if as_json:
        print_json(dict(PRESETS), indent=2)
        return
    names = list(next(iter(PRESETS.values())))
    rows = [(preset, *(str(values[name]) for name in names)) for preset, values in PRESETS.items()]
    print_out(table(("preset", *names), rows))


list_presets_flag: Decorator = click.option(
    "--list-presets",
    cls=PresetList,
    is_flag=True,
    is_eager=True,
    expose_value=False,
    help="Print the options that every preset sets, and exit.",
)
