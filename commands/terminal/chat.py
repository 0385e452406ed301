"""A conversation on a terminal, or line by line from a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from pos2d.commands.terminal.line_editor import at_terminal, read_message, with_line_editing
from pos2d.commands.terminal.panels import Display
from pos2d.commands.terminal.transcript import load_messages, save_messages
from pos2d.errors import InputError, Pos2DError
from pos2d.runtime.backends.options import LoadFlags
from pos2d.runtime.engine.sampling import SamplingFlags, resolve_sampling
from pos2d.runtime.flags import check_known, part_of
from pos2d.runtime.load import load
from pos2d.runtime.run import RunFlags
from pos2d.runtime.text.completions import Event, completion
from pos2d.runtime.text.conversation import Conversation, Message
from pos2d.runtime.text.requests import GenerationFlags

LEAVE = ("quit", "exit")
HELP = """\
/branches QUESTION | QUESTION | …   several at once, in the context of the conversation, which stays as it is
/reset                              begin again
/save FILE, /load FILE              the conversation as JSON
\\ at the end of a line              the message goes on in the next
/help                               this text
quit, exit, Ctrl-D                  leave; Ctrl-C stops an answer"""


def chat(artifact: str | Path, *, context: str | None = None, **flags: Unpack[RunFlags]) -> None:
    """Talk with an artifact on standard input and output; ``context`` is the system turn.

    The other arguments are those of :meth:`pos2d.runtime.Model.conversation` and of :func:`pos2d.load`.

    Raises:
        InputError: not an artifact, no chat template.
        UsageError: a value that cannot be used.
    """
    check_known(RunFlags, flags)
    sampling = resolve_sampling(Path(artifact), part_of(SamplingFlags, flags))
    model = load(artifact, **part_of(LoadFlags, flags))
    system: list[Message] = [{"role": "system", "content": context}] if context else []
    session = Session(model.conversation(system, **part_of(GenerationFlags, flags)), system)
    if at_terminal():
        _note(f"{artifact} ({sampling.summary()}); /help shows the commands")
    with with_line_editing():
        while session.turn():
            pass


class Session:
    """The loop of reading a line and answering it; faults are said and do not end it."""

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
        """Whether the conversation goes on."""
        try:
            line = read_message("User: ")
        except EOFError:
            return self._leave()
        except KeyboardInterrupt:
            _note("\nquit, exit or Ctrl-D leave")
            return True
        except UnicodeDecodeError:
            _note("error: that line is not text in UTF-8")
            return True
        if line.strip().lower() in LEAVE:
            return self._leave()
        try:
            self._answer(line.strip())
        except Pos2DError as error:
            _note(f"error: {' '.join(str(error).split())}")
        return True

    def _leave(self) -> bool:
        if at_terminal():
            _note("Bye.")
        return False

    def _answer(self, line: str) -> None:
        name, rest = [*line.split(maxsplit=1), "", ""][:2]
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/") and "/" not in name[1:]:
            raise InputError(f"there is no {name}; /help shows what there is")
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        with _stoppable(), closing(self._conversation.ask(question)) as events:
            if at_terminal() and sys.stdout.isatty():
                print("Assistant: ", end="", flush=True)
            for event in events:
                print(event.text, end="", flush=True)
        print()

    def _branches(self, text: str) -> None:
        questions = [question.strip() for question in text.split("|") if question.strip()]
        if not questions:
            raise InputError("/branches needs questions, with | between them")
        heard: list[list[Event]] = [[] for _ in questions]
        with Display(questions) as display, _stoppable(), closing(self._conversation.ask_branches(questions)) as events:
            for event in events:
                heard[event.branch].append(event)
                display.hear(event)
        display.finish([completion(question, events) for question, events in zip(questions, heard, strict=True)])

    def _reset(self, _: str) -> None:
        self._conversation.reset(self._system)
        _note("the conversation begins again")

    def _save(self, name: str) -> None:
        save_messages(name, self._conversation.messages)
        _note(f"{len(self._conversation.messages)} messages are in {name}")

    def _load(self, name: str) -> None:
        self._conversation.reset(load_messages(name))
        _note(f"{len(self._conversation.messages)} messages from {name}")


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C ends an answer, and nothing else."""
    try:
        yield
    except KeyboardInterrupt:
        print(" …", end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
