"""How the files of the page are sent."""

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pos2d.runtime.http.page_routes import PAGE, page_routes

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_routes())
    return TestClient(app)


def test_every_file_is_sent_with_its_type_and_the_policy(client: TestClient) -> None:
    for path in PAGE.iterdir():
        response = client.get("/" if path.name == "index.html" else f"/page/{path.name}")
        assert response.status_code == 200, path
        assert response.content == path.read_bytes()
        assert response.headers["content-type"] == TYPES[path.suffix[1:]]
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/page/page.js"])
def test_a_browser_that_has_a_file_is_not_sent_it_again(client: TestClient, path: str) -> None:
    first = client.get(path)
    tag = first.headers["etag"]
    for sent in (tag, f'"other", W/{tag}', "*"):
        again = client.get(path, headers={"If-None-Match": sent})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    assert first.headers["cache-control"] == "no-cache"
    head = client.head(path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(first.content)))


@pytest.mark.parametrize(
    "path", ["/page/", "/page/other.js", "/page/index.html", "/page/..%2fpage_routes.py", "/page/%2e%2e/page_routes.py"]
)
def test_no_other_file_is_sent(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_has_nothing_that_its_policy_forbids() -> None:
    """No script or style inside the document, no other host, no text that becomes markup."""
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), path


def test_files_of_the_page_stay_small() -> None:
    for path in PAGE.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
