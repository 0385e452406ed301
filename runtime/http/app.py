"""The server's application: all routes over one engine."""

from fastapi import FastAPI

from pos2d.runtime.http.errors import add_error_handlers
from pos2d.runtime.http.routes.openai import openai_routes
from pos2d.runtime.http.routes.responses import response_routes
from pos2d.runtime.http.routes.small import small_routes
from pos2d.runtime.http.service import Service
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.texts import Renderer
from pos2d.runtime.serving.engine import Engine


def create_app(engine: Engine, settings: ServerSettings, renderer: Renderer | None = None) -> FastAPI:
    """The application; ``renderer`` renders chat templates in place of the direct way.

    Its ``state.service`` has what the routes share.

    Raises:
        InputError: an artifact without tokenizer, or generation settings that cannot be read.
    """
    app = FastAPI(title="pos2d", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    service = Service(engine, settings, renderer)
    app.state.service = service
    add_error_handlers(app)
    app.include_router(openai_routes(service))
    app.include_router(response_routes(service))
    app.include_router(small_routes(service))
    return app
