"""What all routes share: the engine, the settings, the thread for texts, and the requests that are being answered."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from pos2d.runtime.engine.sampling import generation_defaults
from pos2d.runtime.http.errors import RequestError
from pos2d.runtime.http.limits import Demand, check_demand, check_queue
from pos2d.runtime.http.metrics import Metrics
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.shell import Services
from pos2d.runtime.http.texts import DirectTemplates, Templates
from pos2d.runtime.http.token_texts import TokenTexts
from pos2d.runtime.serving.engine import Engine
from pos2d.runtime.serving.streams import Stream
from pos2d.runtime.text.completions import Event

T = TypeVar("T")


class Cancellable(Protocol):
    """An answer that is being written."""

    choices: int

    def cancel(self, choice: int | None = None) -> None:
        """End one choice, or all of them."""


class Follow(Protocol):
    """Hands on the events of a stream, and takes note of them; closing the iterator cancels the job."""

    def __call__(
        self, stream: Stream, *, branches: int, prompt_tokens: int
    ) -> AsyncGenerator[Sequence[Event], None]: ...


async def follow_only(stream: Stream, *, branches: int, prompt_tokens: int) -> AsyncGenerator[Sequence[Event], None]:
    """The events of ``stream``, of which no note is taken."""
    async for events in stream:
        yield events


class Service:
    """The state of a server. The artifact's generation settings are read once, when it starts.

    Raises:
        InputError: no tokenizer, or generation settings that cannot be read.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, services: Services | None = None) -> None:
        self.engine, self.settings, self.artifact = engine, settings, engine.artifact
        self.positions = engine.artifact.manifest.context_length
        self.spec = engine.artifact.manifest.rope_2d
        self.defaults: Mapping[str, Any] = generation_defaults(engine.artifact.path)
        self.token_texts = TokenTexts(engine.artifact.tokenizer)
        self.running: dict[str, Cancellable] = {}
        # One thread, since tokenizers cannot be used by several.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos2d-texts")
        self.templates: Templates = DirectTemplates(engine.artifact.tokenizer, self._worker)
        self.follow: Follow = follow_only
        self._metrics: Metrics | None = None
        if services is not None:
            self.templates, self.follow, self._metrics = services.templates, services.watch.follow, services.metrics

    def admit(self, demand: Demand) -> None:
        """Check a request before its texts are rendered and encoded.

        Raises:
            RefusedError: 429, the queue is full; 422, it asks for more than the limits allow.
        """
        seconds = 1.0 if self._metrics is None else self._metrics.seconds_per_request
        check_queue(self.engine.load(), self.settings.limits, seconds)
        check_demand(demand, self.settings.limits)

    def close(self) -> None:
        """End the thread for texts."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def in_worker(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that renders or encodes, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, functools.partial(function, *arguments))

    def check_model(self, name: str | None) -> None:
        """Check the name of the model in a request, which may leave it out.

        Raises:
            RequestError: another name.
        """
        if name is not None and name != self.settings.model:
            raise RequestError(
                404,
                f"`model` {name!r} does not exist; this server has {self.settings.model!r}",
                "model",
                "model_not_found",
            )
