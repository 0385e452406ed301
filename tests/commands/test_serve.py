"""The command itself, as a process: how it starts, answers, keeps to itself, and ends."""

import contextlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from click.testing import Result

from pos2d.runtime.http.options import ServeOptions

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-the-test"
serve_module: Any = importlib.import_module("pos2d.runtime.serve")
# The command line, in a process that writes down every connection which it begins itself.
PROGRAM = f"""
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.gethostbyname"):
        print("outgoing:", arguments[1:], file=sys.stderr, flush=True)
sys.addaudithook(hook)
sys.path.insert(0, {str(ROOT)!r})
from pos2d.commands.main import main
main()
"""


@dataclass(frozen=True)
class Command:
    """A server that runs as a process; its log is in a file."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def request(self, path: str, method: str = "GET", **settings: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx2.request(method, self.url + path, headers=headers, timeout=20, verify=False, **settings)

    def stream(self, tokens: int) -> Any:
        body = {"prompt": "Once upon", "max_tokens": tokens, "stream": True}
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx2.stream("POST", f"{self.url}/v1/completions", headers=headers, json=body, timeout=20, verify=False)


@contextlib.contextmanager
def running(artifact: Path, log: Path, *flags: str) -> Iterator[Command]:
    command = [sys.executable, "-c", PROGRAM, "serve", str(artifact), "--port", "0", *flags]
    environment = os.environ | {"POS2D_API_KEY": KEY, "POS2D_TRACEBACK": ""}
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        try:
            ready = None
            while ready is None and process.poll() is None:
                time.sleep(0.02)
                ready = re.search(
                    r"^ready at (http://127\.0\.0\.1:\d+)$", log.read_text(encoding="utf-8"), re.MULTILINE
                )
            assert ready is not None, log.read_text(encoding="utf-8")
            yield Command(process, log, ready[1])
        finally:
            process.kill()


def test_it_answers_finishes_and_ends(talking: Path, tmp_path: Path) -> None:
    """A stream that began before the signal is complete, as long as it is without one."""
    with running(talking / "onnx", tmp_path / "log") as server:
        children = psutil.Process(server.process.pid).children()
        assert server.request("/ready").status_code == 200
        assert httpx2.get(f"{server.url}/ready").status_code == 401
        body = {"prompt": "Once upon", "max_tokens": 4}
        assert server.request("/v1/completions", "POST", json=body).status_code == 200
        lengths = []
        for stops in (False, True):
            with server.stream(200) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                if stops:
                    server.process.send_signal(signal.SIGTERM)
                seen = [line for line in [first, *lines] if line]
            assert seen[-1] == "data: [DONE]"
            assert all(json.loads(line.removeprefix("data: "))["choices"] is not None for line in seen[:-1])
            lengths.append(len(seen))
        assert lengths[0] == lengths[1] > 2
        assert server.process.wait(10) == 0
    assert server.log.read_text(encoding="utf-8").splitlines() == [f"ready at {server.url}"]  # nothing went out either
    assert children
    _, alive = psutil.wait_procs(children, 5)
    assert not alive


def test_a_second_signal_ends_it_at_once(talking: Path, tmp_path: Path) -> None:
    with running(talking / "onnx", tmp_path / "log") as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address) as slow:  # a request that is not complete
            head = f"POST /x HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\ncontent-length: 9\r\n\r\n"
            slow.sendall(head.encode())
            while server.request("/health").status_code != 200:
                pass
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(0.5)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 128 + signal.SIGTERM


def test_a_port_in_use_is_said_before_the_model_is_loaded(call: Callable[..., Result]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = call("serve", "no-such-model", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 6
    assert re.fullmatch(r"error: --port \d+ of 127\.0\.0\.1 is in use; .*\n", result.stderr)


def test_the_extra_is_asked_for(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "EXTRA", ("no_such_module",))
    result = call("serve", "no-such-model")
    assert result.exit_code == 2
    assert "pip install pos2d[serve]" in result.stderr


def test_the_memory_of_the_cache_is_tokens(talking: Path, call: Callable[..., Result]) -> None:
    result = call("serve", str(talking / "onnx"), "--port", "0", "--kv-cache-memory", "100B")
    assert result.exit_code == 2
    assert "--kv-cache-memory" in result.stderr
    assert serve_module.kv_budget(ServeOptions(kv_cache_memory="1kB"), token_bytes=100) == 10
