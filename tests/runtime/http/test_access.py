"""Keys, host names and origins: who may call the server."""

from collections.abc import Iterator

import pytest

from pos2d.errors import UsageError
from pos2d.runtime.http.access import host_name
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.serving.engine import Engine
from tests.runtime.http.servers import Running, serving

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    with serving(engine, api_key=KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Iterator[Running]:
    with serving(engine, allowed_host=("pos2d.example",)) as server:
        yield server


@pytest.mark.parametrize("path", ["/echo", "/page", "/ready", "/metrics", "/openapi.json", "/no-such-path", "/health/"])
def test_every_path_needs_a_key(locked: Running, path: str) -> None:
    refused = locked.request(path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "authentication_error"


def test_health_needs_none(locked: Running) -> None:
    assert locked.request("/health").status_code == 200


@pytest.mark.parametrize("given", [f"Bearer {KEYS[0]}", f"bearer  {KEYS[1]}"])
def test_each_key_opens(locked: Running, given: str) -> None:
    assert locked.request("/echo", headers={"authorization": given}).status_code == 200


@pytest.mark.parametrize("given", ["", "Bearer", KEYS[0], f"Basic {KEYS[0]}", "Bearer first-ke", "Bearer x"])
def test_anything_else_does_not(locked: Running, given: str) -> None:
    assert locked.request("/echo", headers={"authorization": given}).status_code == 401


def test_a_body_without_a_key_is_not_read(locked: Running) -> None:
    before = len(locked.toy.bodies)
    assert locked.request("/echo", "POST", content=b"a" * 1000).status_code == 401
    assert len(locked.toy.bodies) == before


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "[::1]", "pos2d.example"])
def test_the_own_names_are_accepted(plain: Running, host: str) -> None:
    assert plain.request("/echo", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil/localhost",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/echo", "/health", "/metrics"])
def test_other_names_are_refused(plain: Running, host: str, path: str) -> None:
    """Also where a name server says that they are 127.0.0.1."""
    assert plain.request(path, headers={"host": host}).status_code == 421


def test_a_request_without_a_host_is_refused(plain: Running) -> None:
    assert plain.talk(b"GET /echo HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421 ")


def test_a_public_address_has_any_name(engine: Engine) -> None:
    with serving(engine, host="0.0.0.0") as server:
        assert server.request("/echo", headers={"host": "pos2d.example"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost.evil.example"])
def test_pages_elsewhere_may_not_send_requests(plain: Running, origin: str) -> None:
    refused = plain.request("/echo", "POST", headers={"origin": origin, "content-type": "text/plain"}, content=b"{}")
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_the_own_page_may(plain: Running) -> None:
    answer = plain.request("/echo", "POST", headers={"origin": plain.url}, content=b"{}")
    assert answer.text == "2"
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_that_was_named_may_read_answers(engine: Engine) -> None:
    wanted, other = "https://app.example", "https://evil.example"
    with serving(engine, cors_origin=(wanted,), api_key=KEYS) as server:
        asks = {"origin": wanted, "access-control-request-method": "POST"}
        asks["access-control-request-headers"] = "authorization,content-type"
        allowed = server.request("/echo", "OPTIONS", headers=asks)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, wanted)
        refused = server.request("/echo", headers={"origin": wanted})  # a page can see why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, wanted)
        assert server.request("/echo", "OPTIONS", headers={**asks, "origin": other}).status_code == 403


@pytest.mark.parametrize("key", ["", "with space", "with\nbreak", "kl\u00fcgel"])
def test_keys_that_no_header_can_have_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="`api_key`"):
        ServeOptions(api_key=(key,))


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://example.com/page"])
def test_origins_that_no_browser_sends_are_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="`cors_origin`"):
        ServeOptions(cors_origin=(origin,))


@pytest.mark.parametrize("url", ["//a:b", "//[::1", "//a:99999", "null", ""])
def test_what_is_no_url_has_no_host(url: str) -> None:
    assert host_name(url) is None
