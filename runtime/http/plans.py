"""A request as jobs of the engine: everything that can be wrong with it is found while its plan is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pos2d.errors import InputError
from pos2d.layout import CONTEXT, Layout, build_continuations, build_layout
from pos2d.runtime.engine.sampler import new_token_limit
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import check_branches
from pos2d.runtime.http.demands import chat_demand, completion_demand, response_demand, text_demand
from pos2d.runtime.http.errors import refusing
from pos2d.runtime.http.limits import Demand, check_tokens
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.sampling import chat_sampling, completion_sampling, resolve, response_sampling
from pos2d.runtime.http.schemas.chat import ChatRequest
from pos2d.runtime.http.schemas.completions import CompletionRequest
from pos2d.runtime.http.schemas.responses import ResponseRequest
from pos2d.runtime.http.schemas.small import TokenizeRequest
from pos2d.runtime.http.service import Service
from pos2d.runtime.http.texts import check_ids, check_text, encode_plain, encode_questions, turns
from pos2d.runtime.serving.engine import PreparedJob
from pos2d.runtime.serving.jobs import Job
from pos2d.runtime.text.chat_template import check_arguments
from pos2d.runtime.text.options import LayoutOptions, PromptOptions, RequestOptions
from pos2d.runtime.text.sampling_checks import check_sampling
from pos2d.runtime.text.tokenization import EncodedPrompts, encode, encode_prompts

# How many times longer than the model a text may be whose tokens are counted.
COUNTED = 4
# What completion requests call options that have other names in the library.
COMPLETION_NAMES = {"max_new_tokens": "max_tokens", "top_logprobs": "logprobs", "json_schema": "response_format"}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The jobs of a request; each has the same number of choices, which are counted through all jobs.

    ``echoes`` are the texts of the prompts, where the request wants them back.
    """

    jobs: tuple[PreparedJob, ...]
    sampling: Sampling
    has_branches: bool = False
    echoes: tuple[str, ...] = ()

    @property
    def per_job(self) -> int:
        return len(self.jobs[0].layout.last)

    @property
    def choices(self) -> int:
        return len(self.jobs) * self.per_job

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, with the context counted for every branch."""
        return sum(len(job.layout) + (self.per_job - 1) * context_size(job.layout) for job in self.jobs)

    @property
    def shared_tokens(self) -> int:
        """Those of the prompt tokens that another branch reads."""
        return sum((self.per_job - 1) * context_size(job.layout) for job in self.jobs)


def context_size(layout: Layout) -> int:
    """Number of tokens of the context."""
    return int((layout.owners == CONTEXT).sum())


async def plan_chat(service: Service, body: ChatRequest) -> Plan:
    """The plan of a chat request.

    Raises:
        RefusedError: anything that is wrong with it.
    """
    service.check_model(body.model)
    demand = chat_demand(body)
    service.admit(demand)
    limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    names = {"max_new_tokens": limit, "json_schema": "response_format"}
    options = resolve(service, chat_sampling(body), names, body.n or 1)
    arguments = options.chat_template_kwargs
    if not body.messages and not body.branches:
        raise RefusedError(400, "`messages` is empty; give at least one message", "messages")
    with refusing("messages", names):
        service.check_template("messages")
        check_arguments(service.artifact.tokenizer, arguments, uses_template=True)
        messages = service.with_context(turns(body.messages))
        if not body.branches:
            text = await service.templates.for_answer(messages, arguments)
            return await service.in_worker(_plan_rendered, service, text, options.sampling, demand)
    with refusing("branches", names):
        _check_questions(body.branches)
        texts, shared = await service.templates.questions(messages, body.branches, arguments)
        return await service.in_worker(_plan_questions, service, texts, shared, options, demand)


def _plan_rendered(service: Service, text: str, sampling: Sampling, demand: Demand) -> Plan:
    """The plan of the answers to rendered messages."""
    ids = encode_plain(service.artifact.tokenizer, text, service.positions, special=False)
    return _plan(service, [build_continuations(ids, demand.branches, service.spec)], sampling, demand)


def _plan_questions(
    service: Service, texts: Sequence[str], shared: str, options: RequestOptions, demand: Demand
) -> Plan:
    """The plan of rendered questions that begin with ``shared``."""
    for text in texts:
        check_text(service.artifact.tokenizer, text, service.positions)
    encoded = encode_questions(service.artifact.tokenizer, texts, shared)
    return _plan(
        service, [_side_by_side(service, encoded, options.layout)], options.sampling, demand, has_branches=True
    )


def plan_completion(service: Service, body: CompletionRequest) -> Plan:
    """The plan of a completion request.

    Raises:
        RefusedError: anything that is wrong with it.
    """
    service.check_model(body.model)
    demand = completion_demand(body)
    service.admit(demand)
    options = resolve(service, completion_sampling(body), COMPLETION_NAMES, body.n or 1)
    if body.branches:
        return _plan_branches(service, body, body.branches, options, demand)
    scores = bool(body.echo) and body.logprobs is not None
    if scores and demand.branches > 1:
        raise RefusedError(400, "`echo` with `logprobs` takes one answer of each prompt; leave `n` out", "n")
    prompts = _prompts(body.prompt)
    if len(prompts) > service.limits.prompts:
        raise RefusedError(
            422, f"`prompt` has {len(prompts)} prompts, a request may have {service.limits.prompts}", "prompt"
        )
    tokenizer = service.artifact.tokenizer
    with refusing("prompt", COMPLETION_NAMES):
        ids = [
            encode_plain(tokenizer, prompt, service.positions) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        for prompt in ids:
            check_ids(prompt, service.positions)
        layouts = [build_continuations(prompt, demand.branches, service.spec) for prompt in ids]
        for layout in layouts:
            service.artifact.check_ids(layout.ids)
        echoed = prompts if body.echo else []
        echoes = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in echoed]
        return _plan(service, layouts, options.sampling, demand, scores=scores, echoes=echoes)


async def plan_response(service: Service, body: ResponseRequest) -> Plan:
    """The plan of a request to ``/v1/responses``; its instructions are a message of the system.

    Raises:
        RefusedError: anything that is wrong with it.
    """
    service.check_model(body.model)
    demand = response_demand(body)
    service.admit(demand)
    names = {"max_new_tokens": "max_output_tokens", "json_schema": "text", "logprobs": "include"}
    sampling = resolve(service, response_sampling(body), names).sampling
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    with refusing("input", names):
        service.check_template("input")
        asked = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else turns(body.input)
        text = await service.templates.for_answer(service.with_context([*messages, *asked]))
        return await service.in_worker(_plan_rendered, service, text, sampling, demand)


def plan_text(service: Service, prompt: str, given: Mapping[str, Any], wanted: int | None) -> Plan:
    """The plan of a text that is continued as it is, with options by their names in the library.

    ``wanted`` is the number of new tokens that the request itself asks for.

    Raises:
        RefusedError: anything that is wrong with it.
    """
    demand = text_demand(prompt, wanted)
    service.admit(demand)
    options = resolve(service, given, {})
    with refusing("prompt", {}):
        ids = encode_plain(service.artifact.tokenizer, prompt, service.positions)
        return _plan(service, [build_layout([ids], service.spec)], options.sampling, demand)


def _plan_branches(
    service: Service, body: CompletionRequest, branches: Sequence[str], options: RequestOptions, demand: Demand
) -> Plan:
    if not isinstance(body.prompt, str | None):
        raise RefusedError(400, "`prompt` must be one text where `branches` continue it", "prompt")
    if body.echo:
        raise RefusedError(400, "`echo` is not supported with `branches`; leave one of them out", "echo")
    with refusing("branches", COMPLETION_NAMES):
        _check_questions(branches)
        for text in ((body.prompt or "") + branch for branch in branches):
            check_text(service.artifact.tokenizer, text, service.positions)
        visibility = options.layout.apply_to(service.spec).visibility
        encoded = encode_prompts(
            service.artifact.tokenizer,
            branches,
            body.prompt or None,
            chat=False,
            add_special_tokens=len(branches) == 1 or visibility == "isolated",
        )
        return _plan(
            service, [_side_by_side(service, encoded, options.layout)], options.sampling, demand, has_branches=True
        )


def _plan(
    service: Service,
    layouts: Sequence[Layout],
    sampling: Sampling,
    demand: Demand,
    *,
    scores: bool = False,
    has_branches: bool = False,
    echoes: Sequence[str] = (),
) -> Plan:
    """Jobs for ``layouts``, after the checks that need no memory.

    Raises:
        InputError, UsageError: a job that can never run.
    """
    check_sampling(service.artifact, sampling)
    check_branches(service.artifact.manifest, layouts)
    jobs = []
    for layout in layouts:
        count, context = len(layout.last), context_size(layout)
        own = [int((layout.owners == branch).sum()) for branch in range(count)]
        for tokens in own:
            new_token_limit(sampling, context + tokens)
        room = check_tokens(context, own, demand, service.limits)
        limited = replace(
            sampling,
            max_new_tokens=min(sampling.max_new_tokens, room),
            min_new_tokens=min(sampling.min_new_tokens, room),
        )
        job = Job(layout, (limited,) * count, tuple((branch,) for branch in range(count)), scores)
        jobs.append(service.engine.prepare(job))
    return Plan(tuple(jobs), sampling, has_branches, tuple(echoes))


def _side_by_side(service: Service, encoded: EncodedPrompts, options: LayoutOptions) -> Layout:
    return build_layout(encoded.branches, options.apply_to(service.spec), encoded.context)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids."""
    if prompt is None:
        raise RefusedError(400, "`prompt` is missing", "prompt")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _check_questions(branches: Sequence[str]) -> None:
    empty = [str(number) for number, branch in enumerate(branches) if not branch.strip()]
    if empty:
        raise InputError(f"`branches` {', '.join(empty)} is empty; give it some text")


async def tokens_of(service: Service, body: TokenizeRequest) -> list[int]:
    """The token ids of a text or of messages.

    Raises:
        RefusedError: neither or both are given, or fields that have no effect.
    """
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RefusedError(400, "give either `prompt` or `messages`", "prompt")
    tokenizer = service.artifact.tokenizer
    for name in ("chat_template_kwargs", "add_generation_prompt") if body.messages is None else ("add_special_tokens",):
        if getattr(body, name):
            raise RefusedError(400, f"`{name}` has no effect here; leave it out", name)
    with refusing("prompt" if body.messages is None else "messages", {}):
        if body.messages is None:
            return await service.in_worker(_counted, service, body.prompt or "", body.add_special_tokens is not False)
        service.check_template("messages")
        arguments = PromptOptions(chat_template_kwargs=body.chat_template_kwargs).chat_template_kwargs
        check_arguments(tokenizer, arguments, uses_template=True)
        text = await service.templates.for_answer(service.with_context(turns(body.messages)), arguments)
        return await service.in_worker(_counted, service, text, False)


def _counted(service: Service, text: str, special: bool) -> list[int]:
    check_text(service.artifact.tokenizer, text, COUNTED * service.positions)
    return encode(service.artifact.tokenizer, text, special)
