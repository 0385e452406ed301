"""Puts the guards around an application: whatever reaches a route has passed all of them."""

from dataclasses import dataclass

from starlette.middleware.cors import CORSMiddleware

from pos2d.runtime.http.access import LOOPBACK, ApiKeys, HostNames, is_loopback
from pos2d.runtime.http.bodies import Bodies
from pos2d.runtime.http.boundary import Boundary
from pos2d.runtime.http.lifecycle import Lifecycle
from pos2d.runtime.http.limits import Limits
from pos2d.runtime.http.metrics import Metrics
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.http.probes import Probes
from pos2d.runtime.http.refusals import App
from pos2d.runtime.http.templates import Templates
from pos2d.runtime.http.watching import Watch
from pos2d.runtime.serving.engine import Engine


@dataclass(frozen=True, slots=True, eq=False)
class Services:
    """What the routes share: the limits of a request, the chat template, and what follows jobs."""

    options: ServeOptions
    limits: Limits
    metrics: Metrics
    templates: Templates
    lifecycle: Lifecycle
    watch: Watch
    has_template: bool

    @classmethod
    def of(cls, engine: Engine, options: ServeOptions) -> "Services":
        """The services of one server."""
        artifact = engine.artifact
        limits = Limits.of(options, artifact.manifest.context_length, engine.kv_budget)
        templates = Templates(artifact.path, timeout=options.template_timeout, max_characters=limits.characters)
        lifecycle, metrics = Lifecycle(options.grace), Metrics()
        watch = Watch(lifecycle, metrics, options.request_timeout)
        has_template = bool(artifact.tokenizer.chat_template)
        return cls(options, limits, metrics, templates, lifecycle, watch, has_template)


def guarded(app: App, engine: Engine, services: Services) -> App:
    """``app`` behind all guards, from the names by which it may be called to the size of bodies."""
    options, lifecycle, metrics = services.options, services.lifecycle, services.metrics
    app = Bodies(app, max_bytes=options.max_body_bytes, timeout=options.body_timeout)
    app = Probes(app, engine, lifecycle, metrics)
    if options.api_key:
        app = ApiKeys(app, options.api_key)
    if options.cors_origin:
        app = CORSMiddleware(
            app,
            allow_origins=options.cors_origin,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
            expose_headers=("retry-after",),
        )
    if is_loopback(options.host) or options.allowed_host:
        app = HostNames(app, {*LOOPBACK, options.host, *options.allowed_host}, options.cors_origin)
    return Boundary(app, lifecycle, metrics, access_log=options.access_log)
