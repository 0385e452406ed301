"""Responses over HTTP, driven by OpenAI's client: the events of a stream, and what would need a store."""

from typing import Any

import openai
import pytest
from openai.types.responses import response_create_params
from openai.types.responses.response_stream_event import ResponseStreamEvent
from pydantic import TypeAdapter

from pos2d.runtime.http.schemas.responses import ResponseBody, ResponseRequest
from tests.runtime.http.conftest import Server

ASKED: dict[str, Any] = {"model": "tiny", "input": "one", "instructions": "Be brief.", "max_output_tokens": 12}


def expected_text(server: Server, *, turns: Any = (), **options: Any) -> str:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}, *turns]
    return str(server.model.chat(messages, max_new_tokens=12, **options).text)


def test_an_answer_is_the_librarys_and_goes_back_as_input(server: Server) -> None:
    create: Any = server.client.responses.create
    first = create(**ASKED)
    ResponseBody.model_validate(first.model_dump(exclude_unset=True))
    assert first.output_text == expected_text(server)
    assert first.status == "incomplete"
    assert first.incomplete_details.reason == "max_output_tokens"
    assert first.usage.output_tokens == 12
    question = {"role": "user", "content": "two"}
    second = create(**ASKED | {"input": [{"role": "user", "content": "one"}, *first.output, question]})
    turns = [{"role": "assistant", "content": first.output_text}, question]
    assert second.output_text == expected_text(server, turns=turns)


def test_the_events_of_a_stream_are_those_of_the_client(server: Server) -> None:
    create: Any = server.client.responses.create
    events = list(create(**ASKED, stream=True, include=["message.output_text.logprobs"]))
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        known.validate_python(event.model_dump(), strict=False)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    text = expected_text(server)
    assert "".join(event.delta for event in deltas) == text
    final = events[-1].response
    assert final.output_text == events[-4].text == text
    scores = server.model.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        max_new_tokens=12,
        logprobs=True,
    ).logprobs
    streamed = [entry.logprob for event in deltas for entry in event.logprobs]
    assert streamed == pytest.approx(scores, abs=1e-4)
    assert [entry.logprob for entry in final.output[0].content[0].logprobs] == streamed


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_p": 0.5}, "top_p"),
        ({"input": [{"type": "function_call_output", "output": ""}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "text": ""}]}]}, "input.0.content.0.type"),
    ],
)
def test_what_is_not_supported_is_named(server: Server, change: dict[str, Any], param: str) -> None:
    create: Any = server.client.responses.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(**ASKED | change)
    assert refused.value.param == param


def test_every_field_of_the_client_is_known() -> None:
    fields = response_create_params.ResponseCreateParamsStreaming.__annotations__
    assert set(fields) <= set(ResponseRequest.model_fields)
