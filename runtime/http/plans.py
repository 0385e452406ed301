"""A request as jobs of the engine: everything that can be wrong with it is found while its plan is made."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError, UsageError
from pos2d.layout import CONTEXT, Layout, build_continuations, build_layout
from pos2d.runtime.engine.sampler import new_token_limit
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.http.errors import RequestError, refusal
from pos2d.runtime.http.sampling import chat_sampling, completion_sampling, resolve, response_sampling
from pos2d.runtime.http.schemas.chat import ChatRequest
from pos2d.runtime.http.schemas.completions import CompletionRequest
from pos2d.runtime.http.schemas.responses import ResponseRequest
from pos2d.runtime.http.schemas.small import TokenizeRequest
from pos2d.runtime.http.service import Service
from pos2d.runtime.http.texts import encode_plain, encode_questions, turns
from pos2d.runtime.serving.engine import PreparedJob
from pos2d.runtime.serving.jobs import Job
from pos2d.runtime.text.chat_template import check_arguments, require_chat_template
from pos2d.runtime.text.end_tokens import end_token_ids
from pos2d.runtime.text.options import LayoutOptions, PromptOptions
from pos2d.runtime.text.tokenization import EncodedPrompts, encode, encode_prompts

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


def plan_chat(service: Service, body: ChatRequest) -> Plan:
    """The plan of a chat request.

    Raises:
        RequestError: anything that is wrong with it.
    """
    service.check_model(body.model)
    count = _count(service, body.n, body.branches)
    limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    names = {"max_new_tokens": limit, "json_schema": "response_format"}
    options = resolve(service, chat_sampling(body), names, body.n or 1)
    sampling, arguments, tokenizer = options.sampling, options.chat_template_kwargs, service.artifact.tokenizer
    if not body.messages and not body.branches:
        raise RequestError(400, "`messages` is empty; give at least one message", "messages")
    with _refusing("messages", names):
        require_chat_template(tokenizer)
        check_arguments(tokenizer, arguments, uses_template=True)
        messages = turns(body.messages)
        if not body.branches:
            ids = encode_plain(tokenizer, service.renderer.answer(messages, arguments), special=False)
            return _plan(service, [build_continuations(ids, count, service.spec)], sampling)
    with _refusing("branches", names):
        _check_questions(body.branches)
        texts, shared = service.renderer.questions(messages, body.branches, arguments)
        encoded = encode_questions(tokenizer, texts, shared)
        return _plan(service, [_side_by_side(service, encoded, options.layout)], sampling, has_branches=True)


def plan_completion(service: Service, body: CompletionRequest) -> Plan:
    """The plan of a completion request.

    Raises:
        RequestError: anything that is wrong with it.
    """
    service.check_model(body.model)
    count = _count(service, body.n, body.branches)
    options = resolve(service, completion_sampling(body), COMPLETION_NAMES, body.n or 1)
    if body.branches:
        return _plan_branches(service, body, body.branches, options.layout, options.sampling)
    scores = bool(body.echo) and body.logprobs is not None
    if scores and count > 1:
        raise RequestError(400, "`echo` with `logprobs` takes one answer of each prompt; leave `n` out", "n")
    prompts = _prompts(body.prompt)
    if len(prompts) > service.settings.max_prompts:
        raise RequestError(
            422, f"`prompt` has {len(prompts)} prompts, a request may have {service.settings.max_prompts}", "prompt"
        )
    tokenizer = service.artifact.tokenizer
    with _refusing("prompt", COMPLETION_NAMES):
        ids = [encode_plain(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        layouts = [build_continuations(prompt, count, service.spec) for prompt in ids]
        for layout in layouts:
            service.artifact.check_ids(layout.ids)
        echoes = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
        return _plan(service, layouts, options.sampling, scores=scores, echoes=echoes if body.echo else ())


def plan_response(service: Service, body: ResponseRequest) -> Plan:
    """The plan of a request to ``/v1/responses``; its instructions are a message of the system.

    Raises:
        RequestError: anything that is wrong with it.
    """
    service.check_model(body.model)
    names = {"max_new_tokens": "max_output_tokens", "json_schema": "text", "logprobs": "include"}
    sampling = resolve(service, response_sampling(body), names).sampling
    tokenizer = service.artifact.tokenizer
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    with _refusing("input", names):
        require_chat_template(tokenizer)
        asked = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else turns(body.input)
        ids = encode_plain(tokenizer, service.renderer.answer([*messages, *asked], None), special=False)
        return _plan(service, [build_layout([ids], service.spec)], sampling)


def plan_text(service: Service, prompt: str, given: Mapping[str, Any]) -> Plan:
    """The plan of a text that is continued as it is, with options by their names in the library.

    Raises:
        RequestError: anything that is wrong with it.
    """
    options = resolve(service, given, {})
    with _refusing("prompt", {}):
        ids = encode_plain(service.artifact.tokenizer, prompt)
        return _plan(service, [build_layout([ids], service.spec)], options.sampling)


def _plan_branches(
    service: Service, body: CompletionRequest, branches: Sequence[str], layout: LayoutOptions, sampling: Sampling
) -> Plan:
    if not isinstance(body.prompt, str | None):
        raise RequestError(400, "`prompt` must be one text where `branches` continue it", "prompt")
    if body.echo:
        raise RequestError(400, "`echo` is not supported with `branches`; leave one of them out", "echo")
    with _refusing("branches", COMPLETION_NAMES):
        _check_questions(branches)
        visibility = layout.apply_to(service.spec).visibility
        encoded = encode_prompts(
            service.artifact.tokenizer,
            branches,
            body.prompt or None,
            chat=False,
            add_special_tokens=len(branches) == 1 or visibility == "isolated",
        )
        return _plan(service, [_side_by_side(service, encoded, layout)], sampling, has_branches=True)


def _plan(
    service: Service,
    layouts: Sequence[Layout],
    sampling: Sampling,
    *,
    scores: bool = False,
    has_branches: bool = False,
    echoes: Sequence[str] = (),
) -> Plan:
    """Jobs for ``layouts``, after the checks that need no memory.

    Raises:
        InputError, UsageError: a job that can never run.
    """
    end_token_ids(service.artifact.tokenizer, sampling)
    jobs = []
    for layout in layouts:
        count = len(layout.last)
        for branch in range(count):
            new_token_limit(sampling, context_size(layout) + int((layout.owners == branch).sum()))
        job = Job(layout, (sampling,) * count, tuple((branch,) for branch in range(count)), scores)
        jobs.append(service.engine.prepare(job))
    return Plan(tuple(jobs), sampling, has_branches, tuple(echoes))


def _side_by_side(service: Service, encoded: EncodedPrompts, options: LayoutOptions) -> Layout:
    return build_layout(encoded.branches, options.apply_to(service.spec), encoded.context)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids."""
    if prompt is None:
        raise RequestError(400, "`prompt` is missing", "prompt")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _count(service: Service, n: int | None, branches: Sequence[str] | None) -> int:
    count, limit = len(branches) if branches else n or 1, service.settings.max_branches
    if count > limit:
        name = "branches" if branches else "n"
        raise RequestError(422, f"`{name}` asks for {count} answers, a request may have {limit}", name)
    return count


def _check_questions(branches: Sequence[str]) -> None:
    empty = [str(number) for number, branch in enumerate(branches) if not branch.strip()]
    if empty:
        raise InputError(f"`branches` {', '.join(empty)} is empty; give it some text")


@contextmanager
def _refusing(param: str, names: Mapping[str, str]) -> Iterator[None]:
    """Turn the library's errors into refusals of the field ``param``."""
    try:
        yield
    except (InputError, UsageError) as error:
        raise refusal(error, param, names) from None


def plan_tokens(service: Service, body: TokenizeRequest) -> list[int]:
    """The token ids of a text or of messages.

    Raises:
        RequestError: neither or both are given, or fields that have no effect.
    """
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(400, "give either `prompt` or `messages`", "prompt")
    tokenizer = service.artifact.tokenizer
    for_other = ("add_generation_prompt", "chat_template_kwargs") if body.messages is None else ("add_special_tokens",)
    for name in for_other:
        if getattr(body, name):
            raise RequestError(400, f"`{name}` has no effect here; leave it out", name)
    with _refusing("prompt" if body.messages is None else "messages", {}):
        if body.messages is None:
            return encode(tokenizer, body.prompt or "", body.add_special_tokens is not False)
        require_chat_template(tokenizer)
        arguments = PromptOptions(chat_template_kwargs=body.chat_template_kwargs).chat_template_kwargs
        check_arguments(tokenizer, arguments, uses_template=True)
        render = service.renderer.whole if body.add_generation_prompt is False else service.renderer.answer
        return encode(tokenizer, render(turns(body.messages), arguments))
