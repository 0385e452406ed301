"""Limits of a request, which are checked before anything is allocated for it: arithmetic on its sizes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.http.refusals import RefusedError

# A text of more characters than this for each allowed token is not even encoded. English has four or five characters a
# token, and indented code up to ten.
CHARACTERS_PER_TOKEN = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may have; ``kv_budget`` and ``context_length`` are tokens, and the others hold for each of
    its ``prompts``."""

    context_length: int
    kv_budget: int
    prompt_tokens: int
    branches: int
    new_tokens: int
    stops: int
    schema_bytes: int
    prompts: int

    @classmethod
    def of(cls, options: ServeOptions, context_length: int, kv_budget: int) -> "Limits":
        """The limits that the options of a server set for a model and its engine."""
        return cls(
            context_length=context_length,
            kv_budget=kv_budget,
            prompt_tokens=min(options.max_prompt_tokens or context_length, context_length),
            branches=min(options.max_request_branches, options.max_running_branches),
            new_tokens=min(options.max_request_tokens or context_length, context_length),
            stops=options.max_stop,
            schema_bytes=options.max_schema_bytes,
            # Each is a job of its own, and a request whose jobs can never all wait would be refused for ever.
            prompts=max(1, options.max_waiting),
        )

    @property
    def characters(self) -> int:
        """Number of characters of all texts of a request, and of one rendered prompt."""
        return CHARACTERS_PER_TOKEN * self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request asks for, before its texts are encoded.

    ``characters`` are those of all its texts together. ``new_tokens`` are those of each branch, None where the request
    leaves that open. The names are the request's own fields, for the error.
    """

    branches: int
    characters: int
    new_tokens: int | None = None
    stop: Sequence[str] = ()
    schema_bytes: int = 0
    branches_field: str = "branches"
    prompt_field: str = "messages"
    new_tokens_field: str = "max_tokens"


def check_demand(demand: Demand, limits: Limits) -> None:
    """Check what is known of a request before its texts are rendered and encoded.

    Raises:
        RefusedError: 422, one of the numbers is above its limit.
    """
    long = next((len(text) for text in demand.stop if len(text) > MAX_STOP_CHARACTERS), 0)
    new_tokens = (demand.new_tokens or 0) * demand.branches
    for field, count, limit, unit in (
        (demand.branches_field, demand.branches, limits.branches, "branches"),
        ("stop", len(demand.stop), limits.stops, "stop texts"),
        ("stop", long, MAX_STOP_CHARACTERS, "characters in a stop text"),
        ("response_format", demand.schema_bytes, limits.schema_bytes, "bytes of schema"),
        (demand.prompt_field, demand.characters, limits.characters, "characters"),
        (demand.new_tokens_field, new_tokens, limits.new_tokens, "new tokens in all branches"),
    ):
        _check(field, count, limit, unit)


def check_tokens(context_tokens: int, branch_tokens: Sequence[int], demand: Demand, limits: Limits) -> int:
    """The number of new tokens of each branch: what the request asks for, or for which there is room at most.

    ``context_tokens`` are those of the shared context, and ``branch_tokens`` those that each branch has of its own. All
    of them share the positions of the model, and the keys and values of all count against the budget.

    Raises:
        RefusedError: 422, the request is larger than the limits, the model or the KV budget.
    """
    prompt = context_tokens + sum(branch_tokens)
    _check(demand.prompt_field, prompt, limits.prompt_tokens, "tokens in context and prompts")
    room = min(limits.context_length, limits.kv_budget) - prompt
    room = min(room, limits.new_tokens) // len(branch_tokens)
    if demand.new_tokens is None and room >= 1:
        return room
    wanted = demand.new_tokens or 1
    if wanted > room:
        raise RefusedError(
            422,
            f"`{demand.new_tokens_field}` asks for {wanted} new tokens in each of {len(branch_tokens)} branches after "
            f"{prompt} tokens; there is room for {max(0, room)} in each",
            param=demand.new_tokens_field,
        )
    return wanted


def _check(field: str, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise RefusedError(422, f"`{field}` has {count} {unit}; this server takes at most {limit}", param=field)
