"""The requests of the serving benchmarks in this process: through the engine's queue, and one by one."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from http_load import Request

from pos2d import runtime
from pos2d.runtime.serving.engine import Engine
from pos2d.runtime.serving.jobs import Job
from pos2d.runtime.text.options import request_options
from pos2d.runtime.text.requests import prepare_request


class InProcess:
    """An artifact and an engine over it; :meth:`close` ends its thread."""

    def __init__(self, artifact: Path) -> None:
        self.model = runtime.load(artifact)
        self._engine = Engine(self.model)

    def close(self) -> None:
        self._engine.close()

    def greedy(self, request: Request) -> str:
        """The answer to a request that is alone."""
        options = {"max_new_tokens": request.body["max_tokens"], "temperature": 0.0, "ignore_chat_template": True}
        return self.model.generate(request.body["prompt"], **options)[0].text

    async def tokens_per_s(self, users: int, requests: Sequence[Request]) -> float:
        """New tokens a second while so many users at a time have their requests answered."""
        waiting = list(reversed(requests))
        begin = time.perf_counter()
        tokens = await asyncio.gather(*(self._user(waiting) for _ in range(users)))
        return sum(tokens) / (time.perf_counter() - begin)

    async def _user(self, waiting: list[Request]) -> int:
        tokens = 0
        while waiting:
            stream = await self._engine.submit(self._engine.prepare(self._job(waiting.pop())))
            async for events in stream:
                tokens += sum(event.token is not None for event in events)
        return tokens

    def _job(self, request: Request) -> Job:
        given = {"max_new_tokens": request.body["max_tokens"], "temperature": 0.0, "ignore_chat_template": True}
        options = request_options(self.model.path, given)
        prepared = prepare_request(self.model, [request.body["prompt"]], None, options)
        return Job(prepared.layouts[0], (prepared.sampling,), ((0,),))
