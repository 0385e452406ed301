"""The page in a real browser: every part of it can be used."""

import json
from typing import Any

from selenium.webdriver.common.keys import Keys

from tests.runtime.http.page.conftest import Page
from tests.runtime.http.page.server import Script

LONG = "2000"


def test_an_answer_is_copied_as_it_is(page: Page, script: Script) -> None:
    script.texts = {0: "One.\n\n  <b>Two</b> & 三。"}
    page.write("", "A question?")
    page.ask()
    page.wait_until_done()
    page.button("Copy answer 1").click()
    page.wait(lambda: page.texts("#status") == ["Answer 1 is copied"])
    page.find("#document").click()
    page.keys("CONTROL+v")
    assert page.find("#document").get_attribute("value") == page.run(
        "return document.querySelector('.text').textContent"
    )


def test_text_of_the_model_is_never_markup(page: Page, script: Script) -> None:
    hostile = "<img src=x onerror=document.title='run'><script>document.title='run'</script>"
    script.texts = {0: hostile}
    page.write(hostile, hostile)
    page.ask()
    page.wait_until_done()
    assert page.answers() == [hostile]
    assert page.texts("article .asked") == [hostile]
    assert page.find_all("#answers img, #answers script") == []
    assert page.driver.title != "run"


def test_a_reload_is_clean(page: Page) -> None:
    page.write("A document.", "One?", "Two?")
    page.enter("max_tokens", LONG)
    page.ask()
    page.wait(lambda: len(page.answers()) == 2)
    page.driver.refresh()
    page.wait(lambda: page.find("#model").text)
    assert page.find("#document").get_attribute("value") == ""
    assert [it.get_attribute("value") for it in page.find_all("#questions textarea")] == [""]
    assert page.find_all("article") == []
    assert page.find("#empty").is_displayed()
    page.write("", "Three?")
    page.enter("max_tokens", "5")
    page.ask()
    page.wait_until_done()
    assert page.texts("article .asked") == ["Three?"]


def test_the_numbers_are_the_servers(page: Page, script: Script) -> None:
    script.texts = {0: "four" * 5, 1: "four" * 9}
    script.pace = 0.05
    page.write("The market opens at eight.", "One?", "Two?")
    page.ask()
    page.wait_until_done()
    assert [text.split(" · ")[0] for text in page.texts("article .speed")] == ["5 tokens", "9 tokens"]
    speed, first, tokens, cached = page.texts(".stats div")
    assert set(tokens.split()) == {"14", "tokens"}
    (body,) = script.bodies
    assert body["branches"] == ["One?", "Two?"]
    assert body["messages"] == [{"role": "system", "content": "The market opens at eight."}]
    assert body["stream_options"] == {"include_usage": True}
    context = len(json.dumps(body["messages"])) // 4
    assert cached.split() == ["of", str(2 * context + 4), "prompt", "tokens", "cached", str(context)]
    assert 0 < float(first.split()[-2]) < 20
    assert float(speed.split()[-1]) > 0


def test_a_follow_up_has_the_document_and_the_turn_before_it(page: Page, script: Script) -> None:
    script.texts = {0: "At eight."}
    page.write("The market opens at eight.", "When does it open?")
    page.ask()
    page.wait_until_done()
    page.button("Follow up on answer 1").click()
    assert "When does it open?" in page.find("#after").text
    page.keys("And when does it close?", f"CONTROL+{Keys.ENTER}")
    page.wait(lambda: len(script.bodies) == 2)
    page.wait_until_done()
    assert [turn["content"] for turn in script.bodies[1]["messages"]] == [
        "The market opens at eight.",
        "When does it open?",
        "At eight.",
    ]
    assert script.bodies[1]["branches"] == ["And when does it close?"]
    assert not page.find("#after").is_displayed()
    page.button("Edit and ask again").click()
    assert page.find_all("#questions textarea")[0].get_attribute("value") == "And when does it close?"
    assert page.find("#after").is_displayed()


def test_everything_works_with_the_keyboard_alone(page: Page) -> None:
    seen = []

    def focused() -> str:
        name = "const it = document.activeElement; return it.ariaLabel || it.labels?.[0]?.innerText || it.innerText"
        style = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none", "the focus is visible"
        return str(page.run(name))

    for _ in range(8):
        page.keys(Keys.TAB)
        seen.append(focused())
    order = [
        "Skip to the answers",
        "中文",
        "Dark theme",
        "Open file",
        "Document",
        "Add question",
        "Question 1",
        "Settings",
    ]
    assert seen == order
    page.keys(Keys.ENTER, Keys.TAB, "5")  # opens the settings; their first field is selected
    assert page.find("#max_tokens").get_attribute("value") == "5"
    page.enter("max_tokens", LONG)
    page.find("#questions textarea").send_keys("One?")
    page.keys(Keys.ENTER, "Two?", f"CONTROL+{Keys.ENTER}")
    page.wait(lambda: len(page.answers()) == 2 and all(page.answers()))
    for _ in range(30):
        page.keys(Keys.TAB)
        if focused() == "Stop answer 2":
            break
    page.keys(Keys.SPACE)
    page.wait(lambda: page.states()[1] == "Stopped")
    assert page.states()[0] == "Writing"
    page.button("Stop all").send_keys(Keys.ENTER)
    page.wait_until_done()
    assert focused() == "Edit and ask again"
    counts = [int(text.split()[0]) for text in page.texts("article .speed")]
    assert str(sum(counts)) in page.texts(".stats div")[2].replace(",", "").split(), "as the server counts them"


def test_questions_are_added_and_removed(page: Page) -> None:
    page.write("", "One?", "Two?", "Three?")
    page.button("Remove question 2").click()
    assert [it.get_attribute("value") for it in page.find_all("#questions textarea")] == ["One?", "Three?"]
    assert page.run("return document.activeElement.ariaLabel") == "Question 1"
    page.button("Remove question 1").click()
    assert [it.is_displayed() for it in page.find_all("#questions button")] == [False], "one question always stays"


def test_both_languages(page: Page) -> None:
    page.open(language="zh-CN")
    root = "return document.documentElement.lang"
    assert page.run(root) == "zh-Hans"
    assert page.texts("#ask") == ["提问"]
    page.find("#document").send_keys("集市早上八点开门。")
    page.find("#questions textarea").send_keys("几点开门")
    page.enter("max_tokens", "5")
    page.ask()
    page.wait_until_done()
    assert page.states() == ["达到 token 上限"]
    assert page.find(".plot svg").accessible_name.startswith("布局")
    page.find("#language").click()
    assert page.run(root) == "en"
    assert page.find(".plot svg").accessible_name.startswith("Layout")
    assert page.states() == ["Token limit reached"]
    assert page.texts("article .speed")[0].startswith("5 tokens")
    page.driver.refresh()
    assert page.run(root) == "en", "the choice is kept"


def test_the_languages_say_the_same(page: Page) -> None:
    """The same texts with the same values, and every text that the page asks for."""
    tables = page.driver.execute_async_script(
        "const done = arguments[0]; import('/page/strings.js').then((it) => done(it.strings))"
    )

    def values(text: Any) -> set[str]:
        return {part.split("}")[0] for part in str(text).split("{")[1:]}

    en, zh = tables["en"], tables["zh-Hans"]
    assert set(en) == set(zh)
    assert {key: values(en[key]) for key in en if key != "tokens"} == {
        key: values(zh[key]) for key in en if key != "tokens"
    }
    asked = page.run(
        "return ['text', 'label', 'placeholder'].flatMap((it) => "
        "[...document.querySelectorAll(`[data-${it}]`)].map((e) => e.dataset[it]))"
    )
    assert set(asked) <= set(en)


def test_both_themes(page: Page) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.open(theme="dark")
    dark = page.run(ground)
    assert light != dark
    page.button("Light theme").click()
    assert page.run(ground) == light
    page.driver.refresh()
    assert page.run(ground) == light, "the choice is kept"
    page.button("Dark theme").click()
    assert page.run("return localStorage.length") == 0, "the page follows the system again"


def test_axe_finds_nothing_before_and_after_answers(page: Page) -> None:
    """Names, roles, order, contrast and more; of text it asks a contrast of 4.5 to 1, in both themes."""

    def check_contrast() -> None:
        for theme in ("dark", "light"):
            page.prefer(theme=theme)
            assert page.violations("color-contrast") == [], theme

    page.run("document.getElementById('settings').open = true")
    page.enter("seed", "half")
    page.write("A document.", "One?", "Two?")
    page.ask()
    assert page.texts("#seed-error") == ["Give a whole number, or leave it empty."]
    assert page.violations() == []
    check_contrast()
    page.enter("seed", "")
    page.enter("max_tokens", LONG)
    page.ask()
    page.wait(lambda: len(page.answers()) == 2 and all(page.answers()))
    assert page.violations() == []
    page.button("Stop all").click()
    page.wait_until_done()
    check_contrast()


def test_nothing_is_wider_than_the_screen(page: Page, script: Script) -> None:
    script.texts = {0: "word " * 20, 1: "w" * 300}
    page.run("document.getElementById('settings').open = true")
    page.write("A document.", "q" * 120, "Two?")
    page.ask()
    page.wait_until_done()
    page.button("Follow up on answer 1").click()
    outside = (
        "return [...document.querySelectorAll('body *')]"
        ".filter((it) => !it.closest('.unseen, .skip, svg, #after-text') && "
        "it.getBoundingClientRect().right > (it.closest('form') ?? document.body).getBoundingClientRect().right + 0.5)"
        ".map((it) => it.className || it.id || it.tagName)"
    )
    for width in (320, 390, 1000, 1440):
        page.resize(width)
        assert page.run(outside) == [], width
        assert page.run("return document.documentElement.scrollWidth") <= width


def test_motion_is_reduced_on_request(page: Page) -> None:
    page.write("", "One?")
    page.enter("max_tokens", LONG)
    page.ask()
    page.wait(lambda: page.find_all("article[aria-busy=true]"))
    assert page.run("return document.getAnimations().length") == 1
    page.prefer(motion="reduce")
    assert page.run("return document.getAnimations().length") == 0
    page.button("Stop all").click()
    page.wait_until_done()


def test_screen_readers_hear_of_the_start_and_the_end_but_not_of_every_token(page: Page) -> None:
    page.run(
        "window.heard = []; const it = document.getElementById('status');"
        "new MutationObserver(() => heard.push(it.textContent)).observe(it, {childList: true, subtree: true})"
    )
    page.write("", "One?", "Two?")
    page.enter("max_tokens", "30")
    page.ask()
    page.wait_until_done()
    assert page.run("return heard") == ["Sending", "2 answers are being written", "All 2 answers have ended"]
    assert page.find_all("article [aria-live], article[aria-live]") == []
