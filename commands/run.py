"""Answer prompts, or chat."""

import dataclasses
import json
import sys
from typing import Any

import click

from pos2d.commands.shared.options import json_option, layout_options, loading_options, sampling_options, text_or_file
from pos2d.commands.shared.report import show


def or_standard_input(_ctx: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """``-`` stands for what comes in."""
    from pos2d.errors import InputError, UsageError

    if "-" in values and sys.stdin is None:
        raise InputError("standard input is closed; --prompt - reads it")
    if values.count("-") > 1:
        raise UsageError("--prompt - reads standard input, which can be read once; give it once")
    try:
        return tuple(sys.stdin.read().rstrip("\n") if value == "-" else value for value in values)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not text in UTF-8: {error}") from None


def list_presets(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pos2d.runtime.engine.sampling import preset_lines

        click.echo("\n".join(preset_lines()))
        ctx.exit()


def generate(prompt: tuple[str, ...], as_json: bool, jsonl: bool, flags: dict[str, Any]) -> None:
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
        report = runtime.run(prompt=prompt, on_event=display.hear, **flags)
    display.finish(report.completions)
    cut = sum(completion.finish_reason == "length" for completion in report.completions)
    ending = f"; {cut} of {len(report.completions)} answers ended at their greatest length" if cut else ""
    click.echo(
        f"{report.new_tokens} tokens, {report.tokens_per_second:.1f} tokens/s, first after "
        f"{report.first_seconds:.2f} s (loaded in {report.load_seconds:.1f} s, {report.visibility}, "
        f"{report.settings}){ending}",
        err=True,
    )


@click.command()
@click.argument("artifact")
@click.option(
    "--mode",
    type=click.Choice(["generate", "chat"]),
    default="generate",
    show_default=True,
    help="Answer the prompts and leave, or hold a conversation.",
)
@click.option(
    "-p",
    "--prompt",
    multiple=True,
    metavar="TEXT",
    callback=or_standard_input,
    help="Repeat it to ask several at once; - reads standard input.",
)
@click.option(
    "--context",
    "--system-prompt",
    metavar="TEXT|@FILE",
    callback=text_or_file,
    help="Read once, before all prompts; the system turn of a chat template.",
)
@sampling_options
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=list_presets,
    help="Show them and leave.",
)
@layout_options
@click.option("--ignore-chat-template", is_flag=True, help="Take the texts as they are.")
@loading_options
@json_option
@click.option("--jsonl", is_flag=True, help="Print every token as a line of JSON, with the number of its branch.")
def run(mode: str, prompt: tuple[str, ...], as_json: bool, jsonl: bool, **flags: Any) -> None:
    """Answer prompts with an ARTIFACT, several side by side, or chat with it."""
    from pos2d.errors import UsageError

    if flags["logprobs"] and not (as_json or jsonl):
        raise UsageError("--logprobs are shown with --json and --jsonl; add one of them")
    if mode == "chat":
        if prompt or as_json or jsonl or flags.pop("ignore_chat_template"):
            raise UsageError(
                "--prompt, --json, --jsonl and --ignore-chat-template are not for --mode chat; leave them out"
            )
        from pos2d.commands.terminal.chat import chat

        chat(**flags)
    elif not prompt:
        raise UsageError("there is no prompt; give --prompt TEXT, or --mode chat")
    elif as_json and jsonl:
        raise UsageError("--json prints one report and --jsonl a line for every token; give one of them")
    else:
        generate(prompt, as_json, jsonl, flags)
