"""Serve a model over HTTP, until the process is asked to end."""

import contextlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import UsageError
from pos2d.options import read_options, split_options, takes_options
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.http.options import KEY_VARIABLE, ServeOptions
from pos2d.runtime.load import load_opened
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.runtime.serving.engine import Engine
from pos2d.runtime.serving.preload import preload
from pos2d.runtime.text.cache_place import check_contexts
from pos2d.runtime.text.options import ContextOptions
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedFrequencies, TrainedPositions
from pos2d.units import parse_size

if TYPE_CHECKING:
    from pos2d.runtime.http.refusals import App
    from pos2d.runtime.http.shell import Services

# What the extra ``serve`` installs, as modules that the server imports.
EXTRA = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that answers now: its address, and what its owner should know."""

    url: str
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@takes_options(ServeOptions, ContextOptions, LoadOptions, BaseOptions, TrainedFrequencies)
def serve(
    model: str | Path | None = None,
    *,
    context: str | None = None,
    on_ready: Callable[[Serving], None] | None = None,
    **options: Any,
) -> None:
    """Answer requests of HTTP with a model, until SIGTERM or SIGINT; ``on_ready`` is called once it does.

    ``model`` is an artifact or a plain model, as :func:`pos2d.load` takes it. ``context`` is a document that is read
    before the first request; it is the system message of conversations that have none.

    At the signal no request is admitted any more, and those that run are finished within ``grace`` seconds; a second
    one ends the process at once. Nothing goes to the network once the model is loaded.

    Raises:
        UsageError: a value, device or type that cannot be used, or the extra ``serve`` is not installed.
        InputError: no model, no tokenizer.
        OutputError: the port is in use.
    """
    require_extra()
    from pos2d.runtime.http.listening import bind, url_of
    from pos2d.runtime.http.server import run_server

    serving, loading, base, caching = read_options(options, ServeOptions, LoadOptions, BaseOptions, ContextOptions)
    (trained,) = split_options(options, TrainedFrequencies)
    check_contexts(caching.cache_context, [context])
    serving = with_keys(serving)
    with (
        bind(serving.host, serving.port) as bound,  # before loading, which takes longer
        served_model(model, serving, loading, base, caching, TrainedPositions(**trained), context) as served,
    ):
        opened = served.opened

        def ready() -> None:
            if on_ready is not None:
                on_ready(Serving(url_of(bound), (*opened.warnings, *access_warnings(serving)), opened.notes))

        run_server(served.app, bound, served.services, ready, lambda: remove_temporary(opened))


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model behind all routes and their guards, as an ASGI application."""

    opened: OpenedModel
    engine: Engine
    services: "Services"
    app: "App"


@contextlib.contextmanager
def served_model(
    model: str | Path | None,
    serving: ServeOptions,
    loading: LoadOptions,
    base: BaseOptions,
    caching: ContextOptions,
    trained: TrainedPositions,
    context: str | None,
) -> Iterator[ServedModel]:
    """Load a model and start its engine, which ends with the block; the parameters are those of :func:`serve`."""
    from pos2d.runtime.http.app import create_app
    from pos2d.runtime.http.settings import ServerSettings
    from pos2d.runtime.http.shell import Services, guarded

    opened = open_model(model, base, trained)
    loaded = load_opened(opened, loading)
    go_offline()
    engine = Engine(
        loaded,
        branches=serving.max_running_branches,
        kv_budget=kv_budget(serving, loaded.backend.kv_format.token_bytes),
        max_waiting=serving.max_waiting,
    )
    try:
        if context is not None:
            preload(engine, context, caching.cache_context)
        services = Services.of(engine, serving)
        settings = ServerSettings(model=opened.place.resolve().name, context=context, created=int(time.time()))
        app = guarded(create_app(engine, settings, services), engine, services)
        yield ServedModel(opened, engine, services, app)
    finally:
        engine.close()


def require_extra() -> None:
    """Check that the packages of the server are there.

    Raises:
        UsageError: one of them is not installed.
    """
    if not all(importlib.util.find_spec(name) for name in EXTRA):
        raise UsageError("the server needs further packages; install them with: pip install pos2d[serve]")


def with_keys(options: ServeOptions) -> ServeOptions:
    """The options with the keys of the environment, where none was given; no child of this process sees those."""
    variable = os.environ.pop(KEY_VARIABLE, "")
    keys = tuple(line.strip() for line in variable.splitlines() if line.strip())
    return options if options.api_key else replace(options, api_key=keys)


def access_warnings(options: ServeOptions) -> tuple[str, ...]:
    """A warning where everybody in the network may use the server."""
    from pos2d.runtime.http.access import is_loopback

    if options.api_key or is_loopback(options.host):
        return ()
    return ("everybody who reaches this machine may use the server; give an `api_key`",)


def kv_budget(options: ServeOptions, token_bytes: int) -> int | None:
    """The number of tokens whose keys and values fit in ``kv_cache_memory``, None where that is not set.

    Raises:
        UsageError: it holds less than two tokens.
    """
    if options.kv_cache_memory is None:
        return None
    tokens = parse_size(options.kv_cache_memory, "kv_cache_memory") // token_bytes
    if tokens < 2:
        raise UsageError(
            f"`kv_cache_memory` holds {tokens} tokens of this model, which has {token_bytes} B each; give more"
        )
    return tokens


def go_offline() -> None:
    """Keep what is loaded later from looking for it on the Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")  # read when it was imported, perhaps before
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def remove_temporary(opened: OpenedModel) -> None:
    """Remove the files of a model that was added up in memory; a process that ends at once does not do it itself."""
    if opened.temporary is not None:
        shutil.rmtree(opened.temporary.path, ignore_errors=True)
