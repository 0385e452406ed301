"""A Hub on this machine: as much of its API as publishing a model needs, with failures to order."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
# In place of a file that was sent to Xet's own storage; its SHA-256 follows.
XET = b"xet "
LARGE = (".safetensors", ".onnx", ".data", ".npz", ".gguf")


@dataclass
class Branch:
    """A branch: its newest commit and its files."""

    sha: str
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Repository:
    private: bool
    branches: dict[str, Branch]


@dataclass
class Failure:
    """How the next ``times`` requests whose method and path match ``pattern`` end; status 0 cuts the connection."""

    pattern: str
    status: int
    message: str = ""
    times: int = 1


@dataclass
class Hub:
    """The state of the server; ``requests`` are the methods and paths that were asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    organisations: tuple[str, ...] = ("someone",)
    ignored: tuple[str, ...] = ()
    xet: str | None = None

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        digest = hashlib.sha1(repo.encode()).hexdigest()
        self.repositories[repo] = Repository(private, {"main": Branch(digest, dict(files))})
        return self.repositories[repo]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch].files

    def asked(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for failure in self.hub.failures:
            if failure.times and re.search(failure.pattern, request):
                failure.times -= 1
                if failure.status == 0:
                    self.close_connection = True
                    self.connection.close()
                else:
                    body: dict[str, Any] = {"error": failure.message}
                    self.answer(body | {"errors": [{"message": failure.message}]}, failure.status)
                return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/blob/"):
            self.answer({"error": "Invalid username or password."}, 401, "Invalid credentials in Authorization header")
            return
        for pattern, act in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                act(self, *match.groups())
                return
        self.answer({"error": f"nothing at {request}"}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def answer(self, body: Any, status: int = 200, message: str = "", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def branch(self, repo: str, revision: str) -> Branch | None:
        """The branch of that name or with that commit; answers the request where there is none."""
        found = self.hub.repositories.get(repo)
        if found is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        for name, branch in found.branches.items():
            if revision in (name, branch.sha):
                return branch
        self.answer({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
        return None

    def info(self, repo: str, revision: str | None = None) -> None:
        branch = self.branch(repo, revision or "main")
        if branch is not None:
            siblings = [{"rfilename": name} for name in branch.files]
            private = self.hub.repositories[repo].private
            self.answer({"id": repo, "sha": branch.sha, "private": private, "siblings": siblings, "tags": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        if asked["organization"] not in self.hub.organisations:
            message = "You don't have the rights to create a model under the namespace"
            self.answer({"error": message}, 403, message)
            return
        repo = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(repo, {".gitattributes": b""}, private=private)
        self.answer({"url": f"{self.hub.url}/{repo}", "name": repo})

    def new_branch(self, repo: str, name: str) -> None:
        main = self.hub.repositories[repo].branches["main"]
        self.hub.repositories[repo].branches[name] = Branch(main.sha, dict(main.files))
        self.answer({})

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        branch = self.branch(repo, revision)
        if branch is None:
            return
        asked = json.loads(self.body)
        ignored = () if asked.get("gitIgnore") else self.hub.ignored
        files = []
        for file in asked["files"]:
            name = file["path"]
            large = name.endswith(LARGE)
            here = branch.files.get(name)
            oid = None if here is None else (hashlib.sha256(here).hexdigest() if large else git_hash(here))
            if here is not None and here.startswith(XET):
                oid = here.removeprefix(XET).decode()
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": name in ignored, "oid": oid})
        self.answer({"files": files})

    def batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = asked["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.url}/blob/{asked['oid']}"}}
            objects.append(asked | ({} if known else {"actions": upload}))
        self.answer({"objects": objects, "transfer": "basic"})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.answer({})

    def xet_token(self, repo: str, revision: str) -> None:
        assert self.hub.xet is not None
        self.answer({"casUrl": self.hub.xet, "exp": 1 << 40, "accessToken": "t"})

    def commit(self, repo: str, revision: str) -> None:
        branch = self.branch(repo, revision)
        if branch is None:
            return
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", branch.sha) != branch.sha:
            self.answer({"error": "A commit has happened since."}, 412, "A commit has happened since.")
            return
        files = dict(branch.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs.get(value["oid"], XET + value["oid"].encode())
            else:
                del files[value["path"]]
        branch.files = files
        branch.messages.append(header["value"]["summary"])
        branch.sha = hashlib.sha1(self.body).hexdigest()
        url = f"{self.hub.url}/{repo}/commit/{branch.sha}"
        self.answer({"success": True, "commitUrl": url, "commitOid": branch.sha, "pullRequestUrl": None})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        branch = self.branch(repo, revision)
        if branch is not None:
            data = branch.files[name]
            self.answer(data, X_Repo_Commit=branch.sha, ETag=f'"{git_hash(data)}"')


ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/models/([^/]+/[^/]+)", Handler.info),
    (r"GET /api/models/([^/]+/[^/]+)/revision/(.+)", Handler.info),
    (r"GET /api/models/([^/]+/[^/]+)/xet-write-token/(.+)", Handler.xet_token),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", Handler.new_branch),
    (r"POST /api/validate-yaml", Handler.validate),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", Handler.preupload),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /blob/(.+)", Handler.put),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub without repositories, at a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
