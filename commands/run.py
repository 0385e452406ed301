"""``pos2d run``: its flags, its call, and how completions are shown."""

import dataclasses
from typing import Any

import click

from pos2d.commands.shared.flags import (
    FROM_BASE,
    context_flag,
    flags_of,
    json_flag,
    prompt_flag,
    text_or_standard_input,
)
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.presets import list_presets_flag
from pos2d.commands.shared.report import show, warn
from pos2d.commands.shared.streams import has_piped_input, print_json, read_input
from pos2d.errors import UsageError
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.sampling import SamplingOptions
from pos2d.runtime.text.options import ContextOptions, LayoutOptions, PromptOptions
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedFrequencies


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@click.option(
    "--mode",
    type=click.Choice(["generate", "chat"]),
    default="generate",
    show_default=True,
    help="generate: answer the prompts and exit. chat: hold a conversation.",
)
@prompt_flag(callback=text_or_standard_input)
@context_flag
@flags_of(ContextOptions, "Options")
@flags_of(SamplingOptions, "Sampling")
@list_presets_flag
@flags_of(LayoutOptions, "Branches")
@flags_of(PromptOptions, "Options")
@flags_of(LoadOptions, "Loading")
@flags_of(BaseOptions, FROM_BASE)
@flags_of(TrainedFrequencies, FROM_BASE)
@json_flag
@click.option("--jsonl", is_flag=True, help="Print every token as a line of JSON, with the number of its branch.")
def run(mode: str, prompt: tuple[str, ...], as_json: bool, jsonl: bool, **flags: Any) -> None:
    """Answer prompts with a MODEL, or chat with it.

    MODEL is an artifact, or a plain model: a Hugging Face directory, or NAME@REVISION on the Hugging Face Hub. With
    --base-model and --lora in its place, adapters are added to their base in memory, and nothing is written.

    Several prompts are branches of one sequence, and are answered in parallel. Without --prompt, the prompt is read
    from standard input unless that is a terminal. Defaults that are "the artifact's" come
    from its generation_config.json and from its training.
    """
    for name in ("logprobs", "top_logprobs"):
        if flags[name] and not (as_json or jsonl):
            raise UsageError(f"`{name}` are printed with --json and --jsonl; add one of them")
    if mode == "chat":
        if prompt or as_json or jsonl or flags.pop("ignore_chat_template"):
            raise UsageError(
                "`prompt`, --json, `jsonl` and `ignore_chat_template` do not apply to `mode='chat'`; leave them out"
            )
        from pos2d.commands.terminal.chat import chat

        chat(**flags)
        return
    if as_json and jsonl:
        raise UsageError("--json prints one report and --jsonl a line for every token; give one of them")
    generate(prompt or piped_prompt(), as_json, jsonl, flags)


def piped_prompt() -> tuple[str, ...]:
    """The prompt on standard input, where none was given as a flag.

    Raises:
        UsageError: there is none.
    """
    text = read_input().rstrip("\n") if has_piped_input() else ""
    if not text.strip():
        raise UsageError("there is no prompt; give --prompt TEXT, standard input, or --mode chat")
    return (text,)


def generate(prompt: tuple[str, ...], as_json: bool, jsonl: bool, flags: dict[str, Any]) -> None:
    """Answer the prompts, and show the completions while they are written or as JSON."""
    from pos2d import runtime
    from pos2d.commands.terminal.panels import Display

    def write_line(event: runtime.Event) -> None:
        print_json(dataclasses.asdict(event))

    if as_json or jsonl:
        report = runtime.run(prompt=prompt, on_event=write_line if jsonl else None, **flags)
        if as_json:
            show(report, as_json, "")
        warn(report.warnings, report.notes)
        return
    with Display(prompt) as display:
        report = runtime.run(prompt=prompt, on_event=display.show, **flags)
    display.finish(report.completions)
    warn(report.warnings, report.notes)
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
