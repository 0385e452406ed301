"""``pos2d run``: its flags, its call, and how completions are shown."""

import dataclasses
import json
from typing import Any

import click

from pos2d.commands.shared.flags import (
    context_flag,
    flags_of,
    json_flag,
    prompt_flag,
    text_or_standard_input,
)
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.errors import UsageError
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.sampling import PRESETS, SamplingOptions
from pos2d.runtime.text.options import LayoutOptions, PromptOptions


def list_presets(ctx: click.Context, _option: click.Parameter, is_given: bool) -> None:
    """Print the presets and leave."""
    if is_given:
        from pos2d.commands.shared.tables import table

        names = list(next(iter(PRESETS.values())))
        rows = [(preset, *(str(values[name]) for name in names)) for preset, values in PRESETS.items()]
        click.echo(table(("preset", *names), rows))
        ctx.exit()


@click.command(cls=SectionedCommand)
@click.argument("artifact")
@click.option(
    "--mode",
    type=click.Choice(["generate", "chat"]),
    default="generate",
    show_default=True,
    help="generate: answer the prompts and exit. chat: hold a conversation.",
)
@prompt_flag(callback=text_or_standard_input)
@context_flag
@flags_of(SamplingOptions, "Sampling")
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=list_presets,
    help="Print the options that every preset sets, and exit.",
)
@flags_of(LayoutOptions, "Branches")
@flags_of(PromptOptions, "Options")
@flags_of(LoadOptions, "Loading")
@json_flag
@click.option("--jsonl", is_flag=True, help="Print every token as a line of JSON, with the number of its branch.")
def run(mode: str, prompt: tuple[str, ...], as_json: bool, jsonl: bool, **flags: Any) -> None:
    """Answer prompts with an ARTIFACT, or chat with it.

    Several prompts are branches of one sequence, and are answered in parallel. Defaults that are "the artifact's" come
    from its generation_config.json and from its training.
    """
    if flags["logprobs"] and not (as_json or jsonl):
        raise UsageError("`logprobs` are printed with --json and --jsonl; add one of them")
    if mode == "chat":
        if prompt or as_json or jsonl or flags.pop("ignore_chat_template"):
            raise UsageError(
                "`prompt`, --json, `jsonl` and `ignore_chat_template` do not apply to `mode='chat'`; leave them out"
            )
        from pos2d.commands.terminal.chat import chat

        chat(**flags)
    elif not prompt:
        raise UsageError("there is no prompt; give --prompt TEXT, or --mode chat")
    elif as_json and jsonl:
        raise UsageError("--json prints one report and --jsonl a line for every token; give one of them")
    else:
        generate(prompt, as_json, jsonl, flags)


def generate(prompt: tuple[str, ...], as_json: bool, jsonl: bool, flags: dict[str, Any]) -> None:
    """Answer the prompts, and show the completions while they are written or as JSON."""
    from pos2d import runtime
    from pos2d.commands.terminal.panels import Display

    def write_line(event: runtime.Event) -> None:
        click.echo(json.dumps(dataclasses.asdict(event), ensure_ascii=False))

    if as_json or jsonl:
        report = runtime.run(prompt=prompt, on_event=write_line if jsonl else None, **flags)
        if as_json:
            show(report, as_json, "")
        return
    with Display(prompt) as display:
        report = runtime.run(prompt=prompt, on_event=display.show, **flags)
    display.finish(report.completions)
    click.echo(summary(report), err=True)


def summary(report: Any) -> str:
    """One line for people: tokens, rates, and the options in force; ``report`` is a ``RunReport``."""
    count = len(report.completions)
    cut = sum(completion.finish_reason == "length" for completion in report.completions)
    ending = f"; {cut} of {count} answers ended at their maximum length" if cut else ""
    return (
        f"{report.new_tokens} tokens, {report.tokens_per_second:.1f} tokens/s, first after "
        f"{report.first_seconds:.2f} s (loaded in {report.load_seconds:.1f} s, {report.visibility}, "
        f"{report.settings}){ending}"
    )
