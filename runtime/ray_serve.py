"""Serve a model as an application of Ray Serve, whose replicas follow the number of requests.

``serve run pos2d.runtime.ray_serve:build_app model=DIR`` starts it, and ``import_path`` of a configuration for
``serve deploy`` names it. Every replica is a process with an engine of its own, behind the routes of ``pos2d serve``.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pos2d.errors import UsageError
from pos2d.options import KINDS, Option, nearest, options_of, read_options, split_options, texts
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.cluster.connection import machines_in_reach
from pos2d.runtime.cluster.options import ReplicaOptions
from pos2d.runtime.cluster.placement import Placement, check_loading, place_workers, uses_gpu
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.opening.opened_model import open_model
from pos2d.runtime.serve import require_extra, served_model, with_keys
from pos2d.runtime.text.cache_place import check_contexts
from pos2d.runtime.text.options import ContextOptions
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedFrequencies, TrainedPositions

if TYPE_CHECKING:
    from ray.serve import Application

    from pos2d.runtime.http.refusals import App, Receive, Scope, Send

NAME = "pos2d"
GROUPS = (ReplicaOptions, ServeOptions, ContextOptions, LoadOptions, BaseOptions, TrainedFrequencies)
OTHERS = ("model", "context")
# Options of the connections, which are those of Ray Serve's proxy.
OF_THE_PROXY = ("host", "port", "max_connections", "header_timeout", "write_timeout")
# What a replica gets to end after its last request.
LAST_SECONDS = 5
EVERY_ADDRESS = "0.0.0.0"


def build_app(arguments: Mapping[str, Any]) -> "Application":
    """The application; ``arguments`` are the keywords of :func:`pos2d.runtime.serve`, and ``ReplicaOptions``.

    Values may be texts, as the command line of Ray Serve gives them. Every replica has ``threads`` cores, and a GPU if
    the model runs on one; by default the cores of the machines are shared out among ``max_replicas``.

    Raises:
        UsageError: arguments that cannot be used, or no room for the replicas.
        InputError: no model.
    """
    from ray import serve

    require_extra()
    given = typed(arguments)
    scaling, serving, caching, loading, base = read_options(given, *GROUPS[:-1])
    check_contexts(caching.cache_context, [given.get("context")])
    check_loading(loading)
    placement = _placement(given, scaling, loading, base)
    deployment = serve.deployment(
        serve.ingress(_Routes())(_RayReplica),
        name=NAME,
        ray_actor_options={"num_cpus": placement.cores, "num_gpus": placement.gpus},
        max_ongoing_requests=serving.max_running_branches + serving.max_waiting,
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": placement.workers,
            "target_ongoing_requests": scaling.target_ongoing_requests or serving.max_running_branches,
        },
        graceful_shutdown_timeout_s=serving.grace + LAST_SECONDS,
    )
    return deployment.bind(given | {"threads": placement.cores})


def typed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with values of the types that the options declare.

    Raises:
        UsageError: no model, an argument that does not exist, one of the proxy, or a text that is not of the type.
    """
    declared = {name: option for group in GROUPS for name, option in options_of(group).items()}
    for name in arguments:
        if name in OF_THE_PROXY:
            raise UsageError(f"`{name}` belongs to the proxy of Ray Serve; set it in http_options of its configuration")
        if name not in declared and name not in OTHERS:
            raise UsageError(f"there is no argument {name!r}{nearest(name, [*declared, *OTHERS])}")
    if not arguments.get("model") and not arguments.get("base_model"):
        raise UsageError("give a `model`: the directory of an artifact, which every machine must have")
    return {name: _typed(declared[name], value) if name in declared else value for name, value in arguments.items()}


def _typed(option: Option, value: Any) -> Any:
    if option.kind is tuple:
        return texts(value)
    if not isinstance(value, str) or option.kind not in (bool, int, float):
        return value
    try:
        return {"true": True, "false": False}[value.lower()] if option.kind is bool else option.kind(value)
    except (KeyError, ValueError):
        raise UsageError(f"`{option.name}` {value!r} must be {KINDS[option.kind]}") from None


def _placement(given: Mapping[str, Any], scaling: ReplicaOptions, loading: LoadOptions, base: BaseOptions) -> Placement:
    """Room for all replicas."""
    found = machines_in_reach()
    opened = open_model(given.get("model"), base, _positions(given))
    on_gpus = uses_gpu(loading.device, opened.manifest.kind, found)
    if loading.threads is not None and scaling.max_replicas is not None:
        # Machines that are not there yet may be added when replicas need them.
        return Placement(scaling.max_replicas, loading.threads, int(on_gpus))
    return place_workers(
        found, workers=scaling.max_replicas, threads=loading.threads, on_gpus=on_gpus, named="max_replicas"
    )


def _positions(given: Mapping[str, Any]) -> TrainedPositions:
    return TrainedPositions(**split_options(given, TrainedFrequencies)[0])


class _Routes:
    """The application that Ray Serve calls: that of the replica in whose process it is."""

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from ray import serve

        if scope["type"] == "lifespan":  # the replica starts before it, and ends after it
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        await serve.get_replica_context().servable_object.routes(scope, receive, send)


class Replica:
    """An engine of its own behind all routes, in the process that Ray Serve gives it."""

    routes: "App"

    async def start(self, given: Mapping[str, Any]) -> None:
        """Load the model, beside the event loop, which answers Ray Serve meanwhile."""
        _, serving, caching, loading, base = read_options(given, *GROUPS[:-1])
        # The proxy is called by names that a replica does not know.
        serving = with_keys(replace(serving, host=EVERY_ADDRESS))
        self._block = served_model(
            given.get("model"), serving, loading, base, caching, _positions(given), given.get("context")
        )
        self._served = await asyncio.to_thread(self._block.__enter__)
        if self._served.services.has_template:
            await self._served.services.templates.start()
        self.routes = self._served.app

    async def check_health(self) -> None:
        """Called by Ray Serve, which starts the replica again where this raises."""
        if not self._served.engine.is_alive:
            raise RuntimeError("the engine has ended")

    async def close(self) -> None:
        """End the engine; Ray Serve has waited for the requests."""
        if hasattr(self, "_served"):
            await self._served.services.templates.close()
            await asyncio.to_thread(self._block.__exit__, None, None, None)


class _RayReplica(Replica):
    """A replica with the constructor and destructor that Ray Serve awaits."""

    async def __init__(self, given: Mapping[str, Any]) -> None:  # type: ignore[misc]
        await self.start(given)

    async def __del__(self) -> None:
        await self.close()
