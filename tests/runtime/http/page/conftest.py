"""A Chromium that the tests of the page share, and the page in it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.runtime.http.page.server import Script, make_app, serving

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900")
PATIENCE = 20.0
# Buttons that may have a name. The browser is asked for the name of few, since every question takes a while.
BUTTONS = """
    return [...document.querySelectorAll("button")]
        .filter((it) => [it.ariaLabel, it.textContent.trim()].includes(arguments[0]))
"""


class Page:
    """The page in a browser, by what a user sees and does."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, language: str = "en-US", theme: str = "light") -> None:
        agent = {"userAgent": self.run("return navigator.userAgent"), "acceptLanguage": language}
        self.driver.execute_cdp_cmd("Emulation.setUserAgentOverride", agent)
        self.prefer(theme=theme)
        self.resize(1280)
        self.driver.get(self.url)
        self.wait(lambda: self.find("#model").text or self.find("#key").is_displayed())

    def prefer(self, theme: str = "light", motion: str = "no-preference") -> None:
        """What the user told the system about themes and motion."""
        wishes = (("prefers-color-scheme", theme), ("prefers-reduced-motion", motion))
        listed = [{"name": name, "value": value} for name, value in wishes]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The visible texts of elements, read in one go."""
        read = "return [...document.querySelectorAll(arguments[0])].map((it) => it.innerText)"
        return list(self.run(read, selector))

    def answers(self) -> list[str]:
        return self.texts("article .text")

    def states(self) -> list[str]:
        return self.texts("article .state")

    def button(self, name: str) -> WebElement:
        """The visible button with this name, as a screen reader says it."""
        found = [it for it in self.run(BUTTONS, name) if it.is_displayed() and it.accessible_name == name]
        assert found, f"no button {name!r}"
        return found[0]  # type: ignore[no-any-return]

    def wait(self, condition: Callable[[], Any]) -> Any:
        started = time.monotonic()
        while not (value := condition()):
            assert time.monotonic() - started < PATIENCE, "the page did not get there"
            time.sleep(0.02)
        return value

    def keys(self, *keys: str) -> None:
        """Press keys one after the other; a key with ``CONTROL+`` before it is pressed together with Control."""
        chain = ActionChains(self.driver)
        for key in keys:
            if key.startswith("CONTROL+"):
                chain.key_down(Keys.CONTROL).send_keys(key.removeprefix("CONTROL+")).key_up(Keys.CONTROL)
            else:
                chain.send_keys(key)
        chain.perform()

    def write(self, document: str, *questions: str) -> None:
        self.find("#document").send_keys(document)
        for k, question in enumerate(questions):
            if k:
                self.button("Add question").click()
            self.find_all("#questions textarea")[k].send_keys(question)

    def enter(self, name: str, value: str) -> None:
        self.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def enter_question(self, text: str) -> None:
        self.run("document.querySelector('#questions textarea').value = arguments[0]", text)

    def ask(self) -> None:
        self.find("#ask").click()

    def wait_until_done(self) -> None:
        self.wait(lambda: self.find_all("article") and not self.find_all("article[aria-busy=true]"))

    def violations(self, *rules: str) -> list[str]:
        """What axe finds: rules of accessibility that the page breaks, with the elements; all rules unless given."""
        options = {"runOnly": list(rules)} if rules else {}
        found = Axe().run(self.driver, options=options)["violations"]
        return [f"{it['id']}: {[node['target'] for node in it['nodes']]}" for it in found]

    def read_log(self, kind: str) -> list[dict[str, Any]]:
        """The entries since the last call."""
        return list(self.driver.get_log(kind))  # type: ignore[no-untyped-call]

    def logged(self) -> list[str]:
        """What the browser logged, but for refusals of the server, which it logs too."""
        return [it["message"] for it in self.read_log("browser") if it["source"] != "network"]

    def other_hosts(self) -> set[str]:
        """Places other than the server that were asked for something."""
        events = (json.loads(entry["message"])["message"] for entry in self.read_log("performance"))
        urls = {it["params"]["request"]["url"] for it in events if it["method"] == "Network.requestWillBeSent"}
        ours = urlsplit(self.url).netloc
        return {url for url in urls if urlsplit(url).netloc != ours and not url.startswith(("data:", "chrome:"))}


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    browser, helper = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not helper:
        pytest.skip("no chromium and chromedriver on the path (Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(helper))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def script() -> Script:
    return Script()


@pytest.fixture(scope="session")
def server_url(script: Script) -> Iterator[str]:
    """Where the page is: any server with its routes and those of /v1 that it uses."""
    with serving(make_app(script)) as url:
        yield url


@pytest.fixture
def page(driver: webdriver.Chrome, server_url: str, script: Script) -> Iterator[Page]:
    """The page, opened; afterwards the browser must have nothing to complain of, and have asked nobody else."""
    script.reset()
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": server_url.rstrip("/"), "storageTypes": "all"})
    opened = Page(driver, server_url)
    opened.read_log("browser")
    opened.read_log("performance")
    opened.open()
    opened.run("sessionStorage.clear()")
    yield opened
    assert opened.logged() == []
    assert opened.other_hosts() == set()
