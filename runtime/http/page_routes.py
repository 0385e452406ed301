"""Serves the page at ``/`` and its files below ``/page/``, which are read once, when the routes are made."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

PAGE = Path(__file__).parent / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Only our own files, so that text of a model or of a user can neither run nor load anything.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Browsers keep the files and ask whether they changed, so that an update shows at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page, with the headers that it is sent with."""

    content: bytes
    headers: dict[str, str]


def page_routes() -> APIRouter:
    """The routes of the page. They hold nothing secret and take no key: the page itself asks for one."""
    files = {path.name: _read(path) for path in sorted(PAGE.iterdir()) if path.suffix in CONTENT_TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    def index(request: Request) -> Response:
        return _answer(files["index.html"], request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    def file(name: str, request: Request) -> Response:
        if name not in files or name == "index.html":
            raise HTTPException(404, f"the page has no file {name!r}")
        return _answer(files[name], request)

    return router


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content, {**HEADERS, "Content-Type": CONTENT_TYPES[path.suffix], "ETag": etag})


def _answer(file: PageFile, request: Request) -> Response:
    """The file, or 304 where the client has it already; Starlette leaves the body of HEAD to the server."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {file.headers["ETag"], "*"}:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)
