"""What the page shows when the server refuses, ends early, or needs a key."""

from typing import Any

import pytest

from tests.runtime.http.page.conftest import Page
from tests.runtime.http.page.server import Script


@pytest.fixture(autouse=True)
def brief_answers(page: Page, script: Script) -> None:
    script.texts = dict.fromkeys(range(4), "An answer.")


def refusal(message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


def ask(page: Page, *questions: str) -> None:
    page.write("A document.", *(questions or ("One?",)))
    page.ask()


def test_an_error_stands_where_it_was_caused_in_the_servers_words(page: Page, script: Script) -> None:
    ask(page)
    page.wait_until_done()
    for status, param, place in (
        (422, "messages", "document"),
        (413, None, "document"),
        (422, "branches", "questions"),
        (400, "temperature", "temperature"),
        (400, "visibility", "visibility"),
        (400, "stream_options", "form"),
        (503, None, "form"),
    ):
        message = f"The server says <b>no</b> to {param}, and why."
        script.refusals = [(status, {}, refusal(message, param))]
        page.enter_question("Two?")
        page.ask()
        page.wait(lambda place=place, message=message: page.texts(f"#{place}-error") == [message])  # type: ignore[misc]
        assert [text for text in page.texts("form .error") if text] == [message], "errors before it are gone"
        assert page.find(f"#{place}-error").is_displayed()
        assert page.find_all("#questions textarea")[0].get_attribute("value") == "Two?", "what was written stays"
        assert len(page.find_all("article")) == 1
    page.ask()
    page.wait(lambda: len(page.find_all("article")) == 2)
    page.wait_until_done()
    assert [text for text in page.texts("form .error") if text] == []


def test_the_question_that_is_refused_has_the_focus(page: Page, script: Script) -> None:
    script.refusals = [(422, {}, refusal("it is too long", "branches[1]"))]
    ask(page, "One?", "Two?", "Three?")
    page.wait(lambda: page.texts("#questions-error") == ["it is too long"])
    assert page.run("return document.activeElement.ariaLabel") == "Question 2"


def test_a_full_server_says_when_to_try_again(page: Page, script: Script) -> None:
    script.refusals = [(429, {"Retry-After": "1"}, refusal("9 requests are waiting"))]
    ask(page)
    page.wait(lambda: page.texts("#form-error") == ["9 requests are waiting"])
    assert page.texts("#retry") == ["Try again in 1 second."]
    page.wait(lambda: page.texts("#retry") == ["You can try again now."])
    page.ask()
    page.wait_until_done()


def test_the_page_of_a_proxy_is_not_taken_for_an_answer(page: Page, script: Script) -> None:
    script.refusals = [(502, {}, "<html>Bad gateway</html>"), (200, {"Content-Type": "text/html"}, "<html></html>")]
    for status in (502, 200):
        page.enter_question("One?")
        page.ask()
        page.wait(lambda status=status: f"HTTP {status}" in page.texts("#form-error")[0])  # type: ignore[misc]


def test_a_stream_that_breaks_off_is_said_to_be_interrupted(page: Page, script: Script) -> None:
    script.breaks_after = 5
    script.texts = {}
    ask(page, "One?", "Two?")
    page.wait_until_done()
    assert page.states() == ["Interrupted"] * 2
    assert page.answers() == ["word" * 4] * 2
    assert page.texts(".round > .error") == ["The connection ended before the answers did."]


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(page: Page, script: Script) -> None:
    script.key = "sesame"
    page.open()
    assert page.find("#key").is_displayed()
    page.find("#key").send_keys("wrong")
    page.button("Use key").click()
    page.wait(lambda: "key is required" in page.texts("#key-error")[0])
    page.find("#key").clear()
    page.find("#key").send_keys("sesame\n")
    page.wait(lambda: not page.find("#key").is_displayed())
    ask(page)
    page.wait_until_done()
    assert page.run("return [localStorage.length, sessionStorage.length]") == [0, 1]
    assert page.run("return document.cookie") == ""


def test_a_model_without_a_chat_template_is_asked_in_plain_text(page: Page, script: Script) -> None:
    script.has_chat_template = False
    script.texts = {0: " Answer."}
    ask(page, "One?")
    page.wait_until_done()
    page.button("Follow up on answer 1").click()
    page.find("#questions textarea").send_keys("Two?")
    page.ask()
    page.wait(lambda: len(page.answers()) == 2)
    page.wait_until_done()
    chat, first, second = script.bodies
    assert chat["path"] == "/v1/chat/completions"
    assert (first["path"], first["prompt"], first["branches"]) == ("/v1/completions", "A document.\n\n", ["One?"])
    assert (second["prompt"], second["branches"]) == ("A document.\n\nOne? Answer.\n\n", ["Two?"])
    assert "no chat template" in " ".join(page.texts(".note"))


def test_nothing_is_sent_without_a_question_or_with_a_setting_that_is_no_number(page: Page, script: Script) -> None:
    page.ask()
    assert page.texts("#questions-error") == ["Write a question first."]
    page.enter("temperature", "warm")
    ask(page)
    assert page.texts("#temperature-error") == ["Give a number, or leave it empty."]
    page.enter("temperature", "0.5")
    page.enter("seed", "18446744073709551615")  # JavaScript would round it
    page.ask()
    assert page.texts("#seed-error") == ["Give a whole number, or leave it empty."]
    assert script.bodies == []
    page.enter("seed", "7")
    page.enter("visibility", "isolated")
    page.ask()
    page.wait_until_done()
    (body,) = script.bodies
    assert (body["max_tokens"], body["temperature"], body["seed"], body["visibility"]) == (256, 0.5, 7, "isolated")


def test_a_text_file_is_dropped_and_another_file_is_refused(page: Page) -> None:
    drop = """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[0])], arguments[1]));
        document.getElementById("document").dispatchEvent(
          new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    """
    page.run(drop, list("集市 opens.\n".encode()), "notes.txt")
    page.wait(lambda: page.find("#document").get_attribute("value") == "集市 opens.\n")
    page.run(drop, list(b"\x89PNG\x00\xff"), "picture.png")
    page.wait(lambda: "picture.png is not a UTF-8 text file" in page.texts("#document-error")[0])
    assert page.find("#document").get_attribute("value") == "集市 opens.\n", "the document before it stays"
