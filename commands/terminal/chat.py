"""A conversation on a terminal, or line by line from a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pos2d.commands.shared.flags import in_terms_of_flags
from pos2d.commands.shared.report import warn
from pos2d.commands.terminal.line_editor import is_interactive, line_editing, read_message
from pos2d.commands.terminal.panels import Display
from pos2d.commands.terminal.transcript import load_messages, save_messages
from pos2d.errors import InputError, Pos2DError
from pos2d.options import read_options, split_options, takes_options
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.sampling import SamplingOptions
from pos2d.runtime.load import load_opened
from pos2d.runtime.opening.opened_model import open_model
from pos2d.runtime.text.completions import Event, completion
from pos2d.runtime.text.conversation import Conversation, Message
from pos2d.runtime.text.options import ContextOptions, LayoutOptions, PromptOptions, request_options
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedFrequencies, TrainedPositions

LEAVE = ("quit", "exit")
HELP = """\
/branches QUESTION | QUESTION | …   answer several questions at once; the conversation is not changed
/reset                              start again
/save FILE, /load FILE              store or load the conversation as JSON
\\ at the end of a line              continue the message on the next line
/help                               show this text
quit, exit, Ctrl-D                  leave; Ctrl-C stops an answer"""


@takes_options(
    SamplingOptions, LayoutOptions, PromptOptions, ContextOptions, LoadOptions, BaseOptions, TrainedFrequencies
)
def chat(model: str | Path | None = None, *, context: str | None = None, **options: Any) -> None:
    """Hold a conversation with a model on standard input and output; ``context`` is the system message.

    The other keywords are those of :meth:`pos2d.runtime.Model.conversation` and of :func:`pos2d.load`.

    Raises:
        InputError: no model, or no chat template.
        UsageError: a value that cannot be used.
    """
    loading, base = read_options(options, LoadOptions, BaseOptions)
    (trained,) = split_options(options, TrainedFrequencies)
    opened = open_model(model, base, TrainedPositions(**trained))
    answering = request_options(opened.directory, options)
    answering.check_cache(context)
    loaded = load_opened(opened, loading)
    warn([*opened.warnings, *answering.sampling.warnings(opened.place)], opened.notes)
    system: list[Message] = [{"role": "system", "content": context}] if context is not None else []
    session = Session(Conversation(loaded, system, answering), system)
    if is_interactive():
        _print_note(f"{model or base.base_model} ({answering.sampling.summary()}); /help shows the commands")
    with line_editing():
        while session.turn():
            pass


class Session:
    """The loop that reads a line and answers it; an error is printed and does not end the session."""

    def __init__(self, conversation: Conversation, system: Sequence[Message]) -> None:
        self._conversation = conversation
        self._system = system
        self._commands: dict[str, Callable[[str], None]] = {
            "/branches": self._branches,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: print(HELP),
        }

    def turn(self) -> bool:
        """Read and answer one line; False ends the session."""
        try:
            line = read_message("User: ")
        except EOFError:
            return self._leave()
        except KeyboardInterrupt:
            _print_note("\nquit, exit or Ctrl-D leave")
            return True
        except UnicodeDecodeError:
            _print_note("error: that line is not text in UTF-8")
            return True
        if line.strip().lower() in LEAVE:
            return self._leave()
        try:
            self._dispatch(line.strip())
        except Pos2DError as error:
            _print_note(f"error: {in_terms_of_flags(' '.join(str(error).split()))}")
        return True

    def _leave(self) -> bool:
        if is_interactive():
            _print_note("Bye.")
        return False

    def _dispatch(self, line: str) -> None:
        name, argument = [*line.split(maxsplit=1), "", ""][:2]
        if name in self._commands:
            self._commands[name](argument.strip())
        elif name.startswith("/") and "/" not in name[1:]:
            raise InputError(f"there is no command {name}; /help lists the commands")
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        with _interruptible(), closing(self._conversation.ask(question)) as events:
            if is_interactive() and sys.stdout.isatty():
                print("Assistant: ", end="", flush=True)
            for event in events:
                print(event.text, end="", flush=True)
        print(flush=True)

    def _branches(self, text: str) -> None:
        questions = [question.strip() for question in text.split("|") if question.strip()]
        if not questions:
            raise InputError("/branches needs questions with | between them")
        received: list[list[Event]] = [[] for _ in questions]
        with (
            Display(questions) as display,
            _interruptible(),
            closing(self._conversation.ask_branches(questions)) as events,
        ):
            for event in events:
                received[event.branch].append(event)
                display.show(event)
        display.finish([completion(question, events) for question, events in zip(questions, received, strict=True)])

    def _reset(self, _: str) -> None:
        self._conversation.reset(self._system)
        _print_note("the conversation starts again")

    def _save(self, name: str) -> None:
        save_messages(name, self._conversation.messages)
        _print_note(f"{len(self._conversation.messages)} messages are in {name}")

    def _load(self, name: str) -> None:
        self._conversation.reset(load_messages(name))
        _print_note(f"{len(self._conversation.messages)} messages from {name}")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end an answer, and nothing else."""
    try:
        yield
    except KeyboardInterrupt:
        print(" …", end="", flush=True)


def _print_note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
