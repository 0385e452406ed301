"""``/generate`` of the trainer's guide, ``/tokenize``, and ending a request that is being answered."""

from typing import Any

from fastapi import APIRouter, Request, Response

from pos2d.runtime.http.answers import start
from pos2d.runtime.http.choices import collected
from pos2d.runtime.http.connections import whole
from pos2d.runtime.http.json_bytes import json_bytes
from pos2d.runtime.http.plans import plan_text, tokens_of
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.routes.documented import responses
from pos2d.runtime.http.schemas.small import (
    Cancelled,
    CancelRequest,
    Generated,
    GenerateRequest,
    Tokenized,
    TokenizeRequest,
)
from pos2d.runtime.http.service import Service
from pos2d.text_files import json_line


def small_routes(service: Service) -> APIRouter:
    """The other routes."""
    router = APIRouter()

    @router.post("/generate", response_model=Generated, responses=responses(400, 401, 413, 422, 429, 500, 503))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue a text as it is; the response has the text and its continuation."""
        given = {"max_new_tokens": body.max_new_tokens, "temperature": body.temperature}
        wanted = body.max_new_tokens if "max_new_tokens" in body.model_fields_set else None
        answer = await start(service, await service.planned(plan_text, body.prompt, given, wanted), "gen-")
        prompt_ids = answer.plan.jobs[0].layout.ids.tolist()

        async def response() -> bytes:
            (events,) = await collected(answer)
            ids = [*prompt_ids, *(event.token for event in events if event.token is not None)]
            return json_bytes(json_line({"response": await service.in_worker(_decoded, service, ids)}))

        return await whole(request, answer, response)

    @router.post("/tokenize", responses=responses(400, 401, 404, 413, 422))
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """The token ids of a text, or of messages in the chat template."""
        ids = await tokens_of(service, body)
        texts = service.artifact.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        length = service.artifact.manifest.context_length
        return Tokenized(count=len(ids), max_model_len=length, tokens=ids, token_strs=texts)

    @router.post("/v1/requests/{name}/cancel", responses=responses(400, 401, 404, 413, 422))
    async def cancel(name: str, body: CancelRequest | None = None) -> Cancelled:
        """End a request that is being answered, or one branch of it; what was written so far stays."""
        answer = service.running.get(name)
        if answer is None:
            raise RefusedError(404, "no request with this id is being answered; it may be complete", "id")
        branch = None if body is None else body.branch
        if branch is not None and branch >= answer.choices:
            raise RefusedError(400, f"`branch` {branch} does not exist; there are {answer.choices}", "branch")
        answer.cancel(branch)
        return Cancelled(id=name, branch=branch)

    return router


def _decoded(service: Service, ids: list[int]) -> Any:
    return service.artifact.tokenizer.decode(ids, skip_special_tokens=True)
