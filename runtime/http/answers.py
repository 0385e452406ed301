"""A request that is being answered: its streams as one, its usage, and how it ends early."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pos2d.errors import Pos2DError
from pos2d.runtime.http.errors import refusal
from pos2d.runtime.http.plans import Plan
from pos2d.runtime.http.service import Service
from pos2d.runtime.serving.streams import Stream
from pos2d.runtime.text.completions import Event


class RunningAnswer:
    """The events of all choices of a request, as they are written; it can be read once.

    Every choice ends with one event that has a finish reason, also if it is cancelled.
    """

    def __init__(self, service: Service, plan: Plan, streams: Sequence[Stream], name: str) -> None:
        self.plan, self.id = plan, name
        self.choices = plan.choices
        self.completion_tokens = 0
        self._running, self._streams = service.running, streams
        self._followed = [
            service.follow(stream, branches=plan.per_job, prompt_tokens=len(job.layout))
            for stream, job in zip(streams, plan.jobs, strict=True)
        ]
        self._running[name] = self

    def cancel(self, choice: int | None = None) -> None:
        """End one choice, or all of them."""
        if choice is None:
            for stream in self._streams:
                stream.cancel()
        else:
            self._streams[choice // self.plan.per_job].cancel(choice % self.plan.per_job)

    def close(self) -> None:
        """Give back what the answer uses; nothing happens if it is complete."""
        self._running.pop(self.id, None)
        self.cancel()

    def prompt_scores(self, job: int) -> Any:
        """The scores of the prompt of one job, from its first event on."""
        return self._streams[job].prompt_scores

    async def steps(self) -> AsyncGenerator[Sequence[Event], None]:
        """The events of each step; ``Event.branch`` counts the choices."""
        unfinished = set(range(self.choices))
        followed = self._followed
        all_events = followed[0] if len(followed) == 1 else _merged(followed, self.plan.per_job)
        async with aclosing(all_events):
            async for events in all_events:
                for event in events:
                    self.completion_tokens += event.token is not None
                    if event.finish_reason is not None:
                        unfinished.discard(event.branch)
                yield events
        if unfinished:
            yield [Event(choice, None, "", None, "stop") for choice in sorted(unfinished)]

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens, when the answer is complete."""
        prompt = self.plan.prompt_tokens
        cached = self.plan.shared_tokens + sum(stream.cached_tokens for stream in self._streams)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def start(service: Service, plan: Plan, prefix: str) -> RunningAnswer:
    """Submit the jobs of a plan; the answer's name begins with ``prefix`` and cannot be guessed.

    Raises:
        RefusedError: the queue is full.
    """
    streams: list[Stream] = []
    try:
        for job in plan.jobs:
            streams.append(await service.engine.submit(job))
    except BaseException as error:
        for stream in streams:
            stream.cancel()
        if isinstance(error, Pos2DError):
            raise refusal(error) from None
        raise
    return RunningAnswer(service, plan, streams, f"{prefix}{secrets.token_hex(16)}")


async def _merged(
    streams: Sequence[AsyncGenerator[Sequence[Event], None]], per_job: int
) -> AsyncGenerator[Sequence[Event], None]:
    """The events of several streams, with their choices counted through all of them."""
    items: asyncio.Queue[Sequence[Event] | BaseException | None] = asyncio.Queue()

    async def read(number: int, stream: AsyncGenerator[Sequence[Event], None]) -> None:
        try:
            async with aclosing(stream):
                async for events in stream:
                    items.put_nowait([replace(event, branch=number * per_job + event.branch) for event in events])
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
