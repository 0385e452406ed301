"""What all routes share: the engine, the settings, the thread for texts, and the requests that are being answered."""

import asyncio
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from pos2d.runtime.engine.sampling import generation_defaults
from pos2d.runtime.http.limits import Demand, check_demand
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.shell import Services
from pos2d.runtime.http.token_texts import TokenTexts
from pos2d.runtime.serving.engine import Engine

T = TypeVar("T")


class Cancellable(Protocol):
    """An answer that is being written."""

    choices: int

    def cancel(self, choice: int | None = None) -> None:
        """End one choice, or all of them."""


class Service:
    """The state of a server. The artifact's generation settings are read once, when it starts.

    Raises:
        InputError: no tokenizer, or generation settings that cannot be read.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, services: Services) -> None:
        self.engine, self.settings, self.artifact = engine, settings, engine.artifact
        self.positions = engine.artifact.manifest.context_length
        self.spec = engine.artifact.manifest.rope_2d
        self.defaults: Mapping[str, Any] = generation_defaults(engine.artifact.path)
        self.token_texts = TokenTexts(engine.artifact.tokenizer)
        self.running: dict[str, Cancellable] = {}
        # One thread, since tokenizers cannot be used by several.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos2d-texts")
        self.templates, self.follow, self.limits = services.templates, services.watch.follow, services.limits

    def admit(self, demand: Demand) -> None:
        """Check a request before its texts are rendered and encoded.

        Raises:
            BusyError: the queue is full.
            RefusedError: 422, it asks for more than the limits allow.
        """
        self.engine.check_room()
        check_demand(demand, self.limits)

    def close(self) -> None:
        """End the thread for texts."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def planned(self, plan: Callable[..., T], *arguments: Any) -> T:
        """Make the plan of a request in the thread of texts.

        Raises:
            BusyError: the queue is full, which does not wait for that thread.
        """
        self.engine.check_room()
        return await self.in_worker(plan, self, *arguments)

    async def in_worker(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that renders or encodes, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, functools.partial(function, *arguments))

    def check_model(self, name: str | None) -> None:
        """Check the name of the model in a request, which may leave it out.

        Raises:
            RefusedError: another name.
        """
        if name is not None and name != self.settings.model:
            raise RefusedError(
                404,
                f"`model` {name!r} does not exist; this server has {self.settings.model!r}",
                "model",
                code="model_not_found",
            )

    def with_context(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages after the server's own context, which is the system message where they have none."""
        context = self.settings.context
        if context is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": context}, *messages]

    def check_template(self, field: str) -> None:
        """Check that the messages of ``field`` can be rendered. The page, if they cannot, asks without messages.

        Raises:
            RefusedError: 400, the artifact has no chat template.
        """
        if not self.artifact.tokenizer.chat_template:
            raise RefusedError(400, "the model has no chat template; send a `prompt` to /v1/completions", field)
