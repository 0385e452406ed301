"""Limits of a request: what is refused, with which status and field, and what there is room for."""

from dataclasses import replace
from typing import Any

import pytest

from pos2d.errors import UsageError
from pos2d.runtime.http.errors import refusal as error_of
from pos2d.runtime.http.limits import Demand, Limits, check_demand, check_tokens
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.serving.engine import MAX_BRANCHES
from pos2d.runtime.serving.jobs import BusyError

LIMITS = Limits.of(ServeOptions(max_prompt_tokens=100, max_request_tokens=60), context_length=120, kv_budget=1000)


def refusal(function: Any, *arguments: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        function(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("branches", {"branches": 16}),
        ("messages", {"characters": 1600}),
        ("max_tokens", {"new_tokens": 60}),
        ("stop", {"stop": ("a",) * 4}),
        ("stop", {"stop": ("a" * 256,)}),
        ("response_format", {"schema_bytes": 65536}),
    ],
)
def test_the_most_is_taken_and_more_is_refused_with_its_field(field: str, most: dict[str, Any]) -> None:
    (name, value), at_most = next(iter(most.items())), {"branches": 1, "characters": 1} | most
    check_demand(Demand(**at_most), LIMITS)
    more = value + 1 if isinstance(value, int) else tuple(text + "a" for text in value if len(value) == 1) or value * 2
    refused = refusal(check_demand, Demand(**{**at_most, name: more}), LIMITS)
    assert (refused.status, refused.param) == (422, field)
    assert f"`{field}`" in str(refused)


def test_new_tokens_are_those_of_all_branches() -> None:
    check_demand(Demand(branches=6, characters=1, new_tokens=10), LIMITS)
    demand = Demand(branches=6, characters=1, new_tokens=11, new_tokens_field="max_output_tokens")
    assert refusal(check_demand, demand, LIMITS).param == "max_output_tokens"


@pytest.mark.parametrize(
    ("context", "branches", "wanted", "given"),
    [
        (0, [100], 20, 20),  # exactly to the end of the model
        (0, [100], None, 20),
        (40, [10, 10], 30, 30),  # exactly the new tokens of a request
        (40, [10, 10], None, 30),
        (90, [5, 4], None, 10),  # an odd rest is shared out evenly
    ],
)
def test_what_fits_is_given(context: int, branches: list[int], wanted: int | None, given: int) -> None:
    demand = Demand(branches=len(branches), characters=1, new_tokens=wanted)
    assert check_tokens(context, branches, demand, LIMITS) == given


@pytest.mark.parametrize(
    ("context", "branches", "wanted", "field"),
    [
        (0, [101], 1, "messages"),
        (50, [26, 25], 1, "messages"),
        (0, [100], 21, "max_tokens"),
        (90, [5, 4], 11, "max_tokens"),
        (92, [1] * 8, 4, "max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(context: int, branches: list[int], wanted: int | None, field: str) -> None:
    demand = Demand(branches=len(branches), characters=1, new_tokens=wanted)
    refused = refusal(check_tokens, context, branches, demand, LIMITS)
    assert (refused.status, refused.param) == (422, field)


def test_the_kv_budget_is_a_limit_too() -> None:
    small = replace(LIMITS, kv_budget=50)
    demand = Demand(branches=1, characters=1)
    assert check_tokens(0, [40], demand, small) == 10
    assert refusal(check_tokens, 0, [50], demand, small).param == "max_tokens"


def test_a_full_queue_is_429_and_says_when_to_come_back() -> None:
    refused = error_of(BusyError("full", 2.5))
    assert (refused.status, refused.headers) == (429, {"retry-after": "3"})
    assert refused.content["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


def test_a_refusal_shows_a_part_of_what_is_long() -> None:
    shown = RefusedError(400, "a" * 5000, "b" * 5000).content["error"]
    assert (len(shown["message"]), len(shown["param"])) == (1000, 1000)


def test_limits_of_the_options_are_within_the_model() -> None:
    limits = Limits.of(ServeOptions(max_prompt_tokens=1000), context_length=120, kv_budget=1000)
    assert (limits.prompt_tokens, limits.new_tokens) == (120, 120)


def test_a_request_has_no_more_branches_than_may_run() -> None:
    limits = Limits.of(ServeOptions(max_request_branches=8, max_running_branches=4), context_length=120, kv_budget=1000)
    assert refusal(check_demand, Demand(branches=5, characters=1), limits).param == "branches"
    check_demand(Demand(branches=4, characters=1), limits)
    assert ServeOptions().max_running_branches == MAX_BRANCHES


@pytest.mark.parametrize("options", [{"max_body": "1 apple"}, {"kv_cache_memory": "0"}, {"port": 65536}, {"grace": -1}])
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(options))}`"):
        ServeOptions(**options)
