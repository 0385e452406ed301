"""The page over the real routes and the tiny model: the protocol that the scripted server only imitates."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from selenium.webdriver.common.keys import Keys

from pos2d.runtime.scheduling.scheduler import Scheduler, StepResult
from pos2d.runtime.serving.engine import PreparedJob
from pos2d.runtime.serving.jobs import Job
from tests.runtime.http.conftest import Server
from tests.runtime.http.page.conftest import Page

QUESTIONS = ("One?", "Two, and longer?", "Three?", "Four?")
TOKENS = 90


@dataclass
class Pace:
    """The time between two steps in seconds; a slow pace leaves time to press a button."""

    seconds: float = 0.04


@pytest.fixture(scope="module")
def server_url(server: Server) -> str:
    return f"{server.url}/"


@pytest.fixture(autouse=True)
def pace(server: Server, monkeypatch: pytest.MonkeyPatch) -> Pace:
    """Answers have no end token before their limit."""
    step: Callable[[Scheduler], list[StepResult]] = Scheduler.step
    prepare, pace = server.engine.prepare, Pace()

    def slow(scheduler: Scheduler) -> list[StepResult]:
        time.sleep(pace.seconds)
        return step(scheduler)

    def long(job: Job) -> PreparedJob:
        samplings = tuple(replace(one, min_new_tokens=one.max_new_tokens) for one in job.samplings)
        return prepare(replace(job, samplings=samplings))

    monkeypatch.setattr(Scheduler, "step", slow)
    monkeypatch.setattr(server.engine, "prepare", long)
    return pace


def ask(page: Page) -> None:
    page.write("A document.", *QUESTIONS)
    page.enter("max_tokens", str(TOKENS))
    page.ask()
    page.wait(lambda: len(page.answers()) == 4 and all(page.answers()))


def test_a_stopped_answer_stops_while_the_others_are_written_to_their_end(page: Page, pace: Pace) -> None:
    ask(page)
    before = page.answers()
    assert set(page.states()) == {"Writing"}
    page.wait(lambda: all(len(now) > len(then) for now, then in zip(page.answers(), before, strict=True)))
    assert page.texts("article .asked") == list(QUESTIONS)
    tops = {it.rect["y"] for it in page.find_all("article")[:2]}
    assert len(tops) == 1, "the first two answers stand side by side"
    page.button("Stop answer 2").send_keys(Keys.ENTER)
    page.wait(lambda: page.states()[1] == "Stopped")
    stopped = page.answers()[1]
    assert [page.states()[k] for k in (0, 2, 3)] == ["Writing"] * 3
    assert page.run("return document.activeElement.ariaLabel") == "Copy answer 2", "the focus is not lost"
    pace.seconds = 0
    page.wait_until_done()
    assert page.states() == ["Token limit reached", "Stopped", "Token limit reached", "Token limit reached"]
    assert page.answers()[1] == stopped
    counts = [int(text.split()[0]) for text in page.texts("article .speed")]
    assert [counts[k] for k in (0, 2, 3)] == [TOKENS] * 3
    assert counts[1] < TOKENS
    shown = next(text for text in page.texts(".stats div") if "prompt" not in text and "tokens" in text.split())
    assert str(sum(counts)) in shown.split(), "the sum of the page is the server's usage"


def test_all_answers_are_stopped_and_asked_again_from_the_cache(page: Page) -> None:
    ask(page)
    page.button("Stop all").click()
    page.wait_until_done()
    assert set(page.states()) == {"Stopped"}
    label = page.find(".plot svg").accessible_name
    assert label.count("branch ") == 4
    page.button("Edit and ask again").click()
    page.enter("max_tokens", "3")
    page.ask()
    page.wait(lambda: len(page.find_all("article")) == 8)
    page.wait_until_done()
    assert page.states()[:4] == ["Token limit reached"] * 4


def test_the_servers_refusals_stand_beside_their_fields(page: Page) -> None:
    page.write("A document.", "One?")
    page.enter("temperature", "300")
    page.ask()
    page.wait(lambda: "temperature" in page.texts("#temperature-error")[0])
    page.enter("temperature", "")
    page.enter("max_tokens", "0")
    page.ask()
    page.wait(lambda: page.texts("#max_tokens-error")[0])
    page.enter("max_tokens", "3")
    page.enter("document", "word " * 5000)
    page.ask()
    page.wait(lambda: any(page.texts("form .error")))
    assert page.find_all("article") == []
