"""Chat templates under limits of time and memory: they are rendered in a process that can be ended."""

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pos2d
from pos2d.errors import InputError, Pos2DError
from pos2d.runtime.http.options import KEY_VARIABLE
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.template_worker import LENGTH, packed

# The process limits its own CPU time. It is also ended after this many times as long, plus some seconds, if it has not
# got that time on a busy machine, or if its system has no such limit.
WALL_FACTOR, WALL_SECONDS = 4, 5
START_SECONDS = 120
# The return code after SIGKILL, which another process or the kernel sent; the limit of CPU time is another signal.
KILLED = -9
# Requests that may wait for the process.
MAX_QUEUE = 64
PROGRAM = (
    "import sys; sys.path[:] = {paths!r}; from pos2d.runtime.http.template_worker import main; main(*sys.argv[1:])"
)

Messages = Sequence[Mapping[str, Any]]
Arguments = Mapping[str, Any] | None


class Templates:
    """Renders with the chat template of the artifact in ``directory``, within ``timeout`` seconds of CPU.

    ``max_characters`` limits each text. The results are those of ``render_for_answer`` and ``render_questions``. One
    request is rendered at a time. The process is started again where a template ended it.
    """

    def __init__(self, directory: Path, *, timeout: float, max_characters: int) -> None:
        self._directory = directory
        self._timeout = timeout
        self._max_characters = max_characters
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the process, and wait until it has loaded the tokenizer.

        Raises:
            InputError: there is no tokenizer, or one that cannot be read.
        """
        async with self._turn:
            await self._start()

    async def close(self) -> None:
        """End the process; a request that is being rendered fails."""
        if self._process is not None:
            await self._end(self._process)

    async def for_answer(self, messages: Messages, arguments: Arguments = None) -> str:
        """The text that an answer to ``messages`` follows; see ``render_for_answer``.

        Raises:
            InputError: the template does not accept these messages.
            RefusedError: 422, it takes too long for them; 503, too many requests wait for it, or it was killed.
        """
        texts, _ = await self._render({"call": "for_answer", "messages": list(messages), "arguments": arguments})
        return texts[0]

    async def questions(
        self, earlier: Messages, questions: Sequence[str], arguments: Arguments = None
    ) -> tuple[list[str], str]:
        """The text of every question after ``earlier``, and what they share; see ``render_questions``.

        Raises:
            InputError, RefusedError: as :meth:`for_answer`.
        """
        request = {"messages": list(earlier), "questions": list(questions), "arguments": arguments}
        return await self._render({"call": "questions", **request})

    async def _render(self, request: Mapping[str, Any]) -> tuple[list[str], str]:
        if len(self._running) >= MAX_QUEUE:
            raise RefusedError(503, "too many requests wait for the chat template", retry_after=self._timeout)
        try:
            message = packed(request)
        except RecursionError:
            raise RefusedError(422, "the messages are nested too deeply", param="messages") from None
        # A client that goes away must not leave its answer to the next request.
        exchange = asyncio.create_task(self._exchange(message))
        self._running.add(exchange)
        exchange.add_done_callback(self._done)
        answer = await asyncio.shield(exchange)
        if "error" in answer:
            raise InputError(answer["error"])
        shared = answer["shared"]
        return answer.get("texts") or [shared + tail for tail in answer["tails"]], shared

    def _done(self, exchange: "asyncio.Task[Any]") -> None:
        self._running.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # nobody may be left to read it

    async def _exchange(self, message: bytes) -> dict[str, Any]:
        async with self._turn:
            process = self._process or await self._start()
            try:
                async with asyncio.timeout(WALL_FACTOR * self._timeout + WALL_SECONDS):
                    return await self._send(process, message)
            except TimeoutError:
                await self._end(process)
                was_killed = False
            except (asyncio.IncompleteReadError, ConnectionError):
                was_killed = await process.wait() == KILLED
                await self._end(process)
        self._start_again()
        if was_killed:
            raise RefusedError(503, "the process for chat templates was killed; send the request again", retry_after=1)
        raise RefusedError(
            422, f"the chat template takes more than {self._timeout:g} s for these messages", param="messages"
        )

    def _start_again(self) -> None:
        """Start the next process before the next request needs it."""

        async def start() -> None:
            async with self._turn:
                if self._process is None:
                    await self._start()

        starting = asyncio.create_task(start())
        self._running.add(starting)
        starting.add_done_callback(self._done)

    async def _send(self, process: Process, message: bytes) -> dict[str, Any]:
        assert process.stdin is not None
        process.stdin.write(message)
        await process.stdin.drain()
        return await self._receive(process)

    async def _receive(self, process: Process) -> dict[str, Any]:
        assert process.stdout is not None
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        answer: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
        return answer

    async def _start(self) -> Process:
        program = PROGRAM.format(paths=[str(Path(pos2d.__file__).resolve().parents[1]), *filter(None, sys.path)])
        figures = (str(self._directory.absolute()), str(self._timeout), str(self._max_characters))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", program, *figures, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=_environment()
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                answer = await self._receive(process)
            if "error" in answer:
                raise InputError(answer["error"])
        except (TimeoutError, asyncio.IncompleteReadError):
            await self._end(process)
            raise Pos2DError("the process for chat templates ended while it started") from None
        except BaseException:
            await self._end(process)
            raise
        self._process = process
        return process

    async def _end(self, process: Process) -> None:
        if self._process is process:
            self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


def _environment() -> dict[str, str]:
    """The variables of this process without its keys; torch is not needed, and nothing is looked up on the Hub."""
    kept = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return kept | {"HF_HUB_OFFLINE": "1", "USE_TORCH": "0"}
