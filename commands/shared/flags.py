"""Flags of the command line: made from the groups of options that the library declares, and those that verbs share."""

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click

from pos2d.commands.shared.help import SectionedOption
from pos2d.commands.shared.streams import read_input
from pos2d.errors import InputError, UsageError
from pos2d.options import Option, options_of
from pos2d.text_files import read_text

# The heading of flags that name a base and its adapters, in place of a model.
FROM_BASE = "From a base model and adapters, without MODEL"
QUOTES = "'\""
# Escapes that the command line reads in options which say so.
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
ESCAPE = re.compile(r"\\([ntr\\]|u[0-9a-fA-F]{4})")
ESCAPES_HELP = r" \n, \t, \r and \u followed by four digits are read as in JSON, and \\ as a backslash."
LONGEST_QUOTE = 200
Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


def with_flags(*decorators: Decorator) -> Decorator:
    """Several flags as one decorator, in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def flags_of(
    group: type[Any], section: str, *, without: Collection[str] = (), required: Collection[str] = ()
) -> Decorator:
    """A flag for every option of a group but those in ``without``, in a section of the help page."""
    declared = (option for name, option in options_of(group).items() if name not in without)
    return with_flags(*(flag_of(option, section, required=option.name in required) for option in declared))


def flag_of(option: Option, section: str, *, required: bool = False) -> Decorator:
    """One flag. click checks choices and the kind of value; the library checks ranges and what belongs together."""
    names = [flag_name(option.name), *option.flags, option.name]
    text = in_terms_of_flags(option.help) + (ESCAPES_HELP if option.escapes else "")
    section = option.section or section
    if option.kind is bool:
        return click.option(*names, is_flag=True, default=False, help=text, cls=SectionedOption, section=section)
    default = option.default_text
    if default is None and option.default not in (None, "", ()):
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
    return click.option(
        *names,
        type=_type_of(option),
        multiple=option.kind is tuple,
        default=None,
        required=required,
        metavar=option.metavar,
        callback=unescaped if option.escapes else None,
        help=text if default is None else f"{text}  [default: {default}]",
        cls=SectionedOption,
        section=section,
    )


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object, such as ``{"enable_thinking": false}``, or the file that ``@FILE`` names."""
    text = content_of(text)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        shown = text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."
        raise click.BadParameter(f"{shown!r} must be a JSON object, such as '{{\"enable_thinking\": false}}'")
    return values


def _type_of(option: Option) -> Any:
    """The type of a flag, or of each of its values."""
    if option.choices:
        return click.Choice(option.choices)
    readers: dict[Any, Any] = {tuple: str, Mapping: json_object}
    return readers.get(option.kind, option.kind)


def flag_name(option: str) -> str:
    """``--lora-rank`` of ``lora_rank``."""
    return f"--{option.replace('_', '-')}"


def in_terms_of_flags(message: str) -> str:
    """Say a message of the library, which names parameters in backticks, in the words of the command line.

    ``lora_rank`` becomes ``--lora-rank``, ``quant='int8'`` becomes ``--quant int8`` and ``force=True`` becomes
    ``--force``; other text in backticks stays as it is.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        return flag_name(name) if value in (None, "True") else f"{flag_name(name)} {value.strip(QUOTES)}"

    return re.sub(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`", flag, message)


def whole_numbers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """Read ``1,8,16``."""
    try:
        return tuple(int(part) for part in value.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter(f"{value!r} must be whole numbers, such as 1,8,16") from None


def unescaped(_context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Read the escapes in texts that a shell hands over as they are typed; other backslashes stay."""

    def character(match: re.Match[str]) -> str:
        letter, number = match[1][0], match[1][1:]
        return chr(int(number, 16)) if number else ESCAPED[letter]

    texts = (ESCAPE.sub(character, value) for value in values)
    # Two escapes may be the halves of one character, as in JSON.
    return tuple(text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") for text in texts)


def text_or_file(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Read the file that ``@FILE`` names; other texts stand for themselves."""
    return None if value is None else content_of(value)


def content_of(value: str) -> str:
    """The text of the file that ``@FILE`` names; other texts stand for themselves.

    Raises:
        InputError: a file that cannot be read, or that is empty.
    """
    if not value.startswith("@"):
        return value
    try:
        text = read_text(Path(value[1:])).rstrip("\n")
    except OSError as error:
        raise InputError(f"{value[1:]} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a path with a zero byte
        raise InputError(f"{value[1:]} cannot be read: {error}") from None
    if not text.strip():
        raise InputError(f"{value[1:]} is empty; leave it out, or put some text there")
    return text


def text_or_standard_input(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Read standard input in place of ``-``."""
    if "-" in values and sys.stdin is None:
        raise InputError("standard input is closed; `prompt='-'` reads it")
    if values.count("-") > 1:
        raise UsageError("`prompt='-'` reads standard input, which can be read once; give it once")
    return tuple(read_input().rstrip("\n") if value == "-" else value for value in values)


json_flag = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
output_flag = click.option("-o", "--output", required=True, metavar="OUT", help="Directory to write.")
force_flag = click.option("--force", is_flag=True, help="Replace the output if it exists.")
context_flag = click.option(
    "--context",
    "--system-prompt",
    metavar="TEXT|@FILE",
    callback=text_or_file,
    help="Text before all prompts, or @FILE to read it from a file. It is prefilled once, and it is the system "
    "message if the model has a chat template.",
)


def prompt_flag(**settings: Any) -> Decorator:
    """``-p``, which has one meaning in every command; ``settings`` are click's."""
    text = "Prompt. Repeat the flag for several prompts, which are the branches of one sequence."
    reads = " The prompt - is read from standard input." if "callback" in settings else ""
    return click.option("-p", "--prompt", multiple=True, metavar="TEXT", help=text + reads, **settings)
