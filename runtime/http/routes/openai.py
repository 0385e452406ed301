"""``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``."""

from fastapi import APIRouter, Request, Response

from pos2d.runtime.http.answers import start
from pos2d.runtime.http.chat_format import ChatChunks, chat_completion
from pos2d.runtime.http.completion_format import CompletionChunks
from pos2d.runtime.http.connections import EventStream, whole
from pos2d.runtime.http.plans import plan_chat, plan_completion
from pos2d.runtime.http.routes.documented import responses
from pos2d.runtime.http.schemas.chat import ChatCompletion, ChatRequest
from pos2d.runtime.http.schemas.common import ModelFacts, ModelList
from pos2d.runtime.http.schemas.completions import Completion, CompletionRequest
from pos2d.runtime.http.service import Service


def openai_routes(service: Service) -> APIRouter:
    """The routes that OpenAI's clients use most."""
    router = APIRouter()
    model, tokens = service.settings.model, service.token_texts
    facts = ModelFacts(
        id=model,
        object="model",
        created=service.settings.created,
        owned_by="pos2d",
        max_model_len=service.artifact.manifest.context_length,
    )

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=responses(streams=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer messages, or several questions after them: `branches`."""
        answer = await start(service, await plan_chat(service, body), "chatcmpl-")
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(answer, ChatChunks(answer, model, tokens, include_usage))
        return await whole(request, answer, lambda: chat_completion(answer, model, tokens))

    @router.post("/v1/completions", response_model=Completion, responses=responses(streams=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids as they are."""
        answer = await start(service, await service.planned(plan_completion, body), "cmpl-")
        chunks = CompletionChunks(
            answer,
            model,
            tokens,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            echo_only=body.max_tokens == 0,
        )
        return EventStream(answer, chunks) if body.stream else await whole(request, answer, chunks.whole)

    @router.get("/v1/models", responses=responses(401))
    async def models() -> ModelList:
        """The model of this server."""
        return ModelList(object="list", data=[facts])

    @router.get("/v1/models/{name:path}", responses=responses(401, 404, 422))
    async def model_of(name: str) -> ModelFacts:
        """The model with a name."""
        service.check_model(name)
        return facts

    return router
