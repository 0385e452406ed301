"""The process in which chat templates are rendered: it reads requests from standard input until that is closed.

A message is four bytes of length and a JSON value. A template may loop for ever, or build a text without end; this
process can be ended, which a thread cannot. Started as ``-m`` with a directory, CPU seconds and characters.
"""

import contextlib
import json
import os
import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pos2d.errors import Pos2DError

# Memory that rendering may take beside what the process has once the tokenizer is loaded.
MEMORY_BYTES = 256 * 1024 * 1024
LENGTH = struct.Struct(">I")
PR_SET_PDEATHSIG = 1


def main(directory: str, cpu_seconds: str, max_characters: str) -> None:
    """Answer requests; one that takes more than ``cpu_seconds`` ends the process."""
    requests, answers = _private_pipes()
    _end_with_parent()
    from pos2d.hf.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(Path(directory))
    except Pos2DError as error:
        write_message(answers, {"error": str(error)})
        return
    # What rendering imports is loaded before the memory is limited. The artifact's own template runs under the limits.
    tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template="a", tokenize=False)
    _limit_memory()
    write_message(answers, {})
    while (request := read_message(requests)) is not None:
        _limit_time(float(cpu_seconds))
        try:
            answer = render(tokenizer, request, int(max_characters))
        except Pos2DError as error:
            reason = str(error)[:1000]  # an error without words is that of memory
            answer = {"error": f"{reason}it needs too much memory" if reason.endswith(": ") else reason}
        except (RecursionError, MemoryError):
            answer = {"error": "the chat template needs too much memory for these messages"}
        finally:
            _limit_time(0)
        write_message(answers, answer)


def render(tokenizer: Any, request: Mapping[str, Any], max_characters: int) -> dict[str, Any]:
    """The answer to a request, as the functions of ``chat_template.py`` give it in any process.

    Raises:
        InputError: the template does not accept these messages.
    """
    from pos2d.runtime.text.chat_template import render_for_answer, render_questions

    arguments = request.get("arguments")
    if request["call"] == "for_answer":
        texts, shared = [render_for_answer(tokenizer, request["messages"], arguments)], ""
    else:
        texts, shared = render_questions(tokenizer, request["messages"], request["questions"], arguments)
    if max(map(len, [*texts, shared])) > max_characters:
        return {"error": f"the chat template makes more than {max_characters} characters of these messages"}
    if all(text.startswith(shared) for text in texts):  # all texts have it, which is sent once
        return {"shared": shared, "tails": [text[len(shared) :] for text in texts]}
    return {"shared": shared, "texts": texts}


def read_message(stream: BinaryIO) -> Any:
    """The next message, None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(stream.read(LENGTH.unpack(head)[0]))


def write_message(stream: BinaryIO, value: Any) -> None:
    """Write a message at once."""
    stream.write(packed(value))
    stream.flush()


def packed(value: Any) -> bytes:
    """A message as bytes."""
    body = json.dumps(value).encode()
    return LENGTH.pack(len(body)) + body


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output under other numbers: what a library prints must not come between the messages."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _end_with_parent() -> None:
    """Leave signals that a terminal or a service manager sends to all processes to the parent, but die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory() -> None:
    """Limit the memory of this process, and forbid it to write files."""
    if sys.platform == "win32":
        return
    import resource

    import psutil

    used = psutil.Process().memory_info().vms
    for kind, limit in (
        (resource.RLIMIT_AS, used + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):  # a system may not know the limit, or have a lower one
            resource.setrlimit(kind, (limit, limit))


def _limit_time(seconds: float) -> None:
    """End this process after so much CPU time; 0 takes the limit back. Its signal ends it also inside C code."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
