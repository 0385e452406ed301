"""``/v1/responses``."""

from fastapi import APIRouter, Request, Response

from pos2d.runtime.http.answers import start
from pos2d.runtime.http.connections import EventStream, whole
from pos2d.runtime.http.plans import plan_response
from pos2d.runtime.http.response_format import ResponseEvents
from pos2d.runtime.http.routes.documented import responses
from pos2d.runtime.http.schemas.responses import ResponseBody, ResponseRequest
from pos2d.runtime.http.service import Service


def response_routes(service: Service) -> APIRouter:
    """The route of OpenAI's newer clients."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=ResponseBody, responses=responses(streams=True))
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer a text or messages; nothing is stored."""
        answer = await start(service, await plan_response(service, body), "resp_")
        events = ResponseEvents(answer, body, service.settings.model, service.token_texts)
        return EventStream(answer, events) if body.stream else await whole(request, answer, events.whole)

    return router
