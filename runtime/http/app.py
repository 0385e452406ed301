"""The server's application: all routes over one engine."""

from fastapi import FastAPI

from pos2d.runtime.http.errors import add_error_handlers
from pos2d.runtime.http.page_routes import page_routes
from pos2d.runtime.http.routes.openai import openai_routes
from pos2d.runtime.http.routes.responses import response_routes
from pos2d.runtime.http.routes.small import small_routes
from pos2d.runtime.http.service import Service
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.shell import Services
from pos2d.runtime.serving.engine import Engine


def create_app(engine: Engine, settings: ServerSettings, services: Services) -> FastAPI:
    """The application. ``services.templates`` must have been started before it is called.

    Its ``state.service`` has what the routes share.

    Raises:
        InputError: an artifact without tokenizer, or generation settings that cannot be read.
    """
    app = FastAPI(title="pos2d", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    service = Service(engine, settings, services)
    app.state.service = service
    add_error_handlers(app)
    app.include_router(openai_routes(service))
    app.include_router(response_routes(service))
    app.include_router(small_routes(service))
    app.include_router(page_routes())
    return app
