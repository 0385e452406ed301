"""What all routes share: the engine, the settings, the thread for texts, and the requests that are being answered."""

import asyncio
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from pos2d.runtime.engine.sampling import generation_defaults
from pos2d.runtime.http.errors import RequestError
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.texts import DirectRenderer, Renderer
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

    def __init__(self, engine: Engine, settings: ServerSettings, renderer: Renderer | None = None) -> None:
        self.engine, self.settings, self.artifact = engine, settings, engine.artifact
        self.spec = engine.artifact.manifest.rope_2d
        self.renderer = renderer or DirectRenderer(engine.artifact.tokenizer)
        self.defaults: Mapping[str, Any] = generation_defaults(engine.artifact.path)
        self.token_texts = TokenTexts(engine.artifact.tokenizer)
        self.running: dict[str, Cancellable] = {}
        # One thread, since tokenizers cannot be used by several.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos2d-texts")

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
