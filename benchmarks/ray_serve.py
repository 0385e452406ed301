"""The server on Ray Serve with two replicas: streams, a client that leaves, and a replica that is killed.

Starts ``serve run`` on this machine, asks with OpenAI's client, closes a stream early and sees that its request ends,
kills the process of a replica and asks on until there are two again. The exit code is 1 if a request fails or a replica
does not come back. Needs ``pip install 'pos2d[ray,serve]' openai``.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil
from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
REPLICA = "ray::ServeReplica"
START_SECONDS, RETURN_SECONDS = 180, 120
Ask = Callable[..., Any]
RUNNING = "pos2d:num_requests_running"


@click.command()
@click.argument("model", default=str(ROOT / "demo" / "int8"))
def bench(model: str) -> None:
    """Try MODEL with two replicas."""
    with served(Path(model).resolve()) as (url, command):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=RETURN_SECONDS)
        ask = partial(client.chat.completions.create, model=Path(model).resolve().name)
        with ThreadPoolExecutor(16) as pool:
            chunks = list(pool.map(lambda number: streamed(ask, number, 32), range(64)))
        say(f"{len(chunks)} streams, 16 at a time, of {min(chunks)} to {max(chunks)} chunks")
        leave(ask, url)
        replace(ask, command)


@contextlib.contextmanager
def served(model: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server that is ready, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    application = {
        "name": "pos2d",
        "route_prefix": "/",
        "import_path": "pos2d.runtime.ray_serve:build_app",
        "args": {"model": str(model), "threads": 1, "min_replicas": 2, "max_replicas": 2},
    }
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"http_options": {"port": port}, "applications": [application]}, file)  # JSON is YAML
        file.flush()
        program = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", file.name]
        with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                command = psutil.Process(process.pid)
                wait_until(lambda: len(replicas(command)) == 2 and is_ready(url), START_SECONDS, "the server starts")
                yield url, command
            finally:
                process.send_signal(signal.SIGINT)


def streamed(ask: Ask, number: int, tokens: int) -> int:
    """Ask one question; return the number of chunks of the answer."""
    messages = [{"role": "user", "content": f"What is a volcano? ({number})"}]
    return sum(1 for _ in ask(messages=messages, max_tokens=tokens, stream=True))


def leave(ask: Ask, url: str) -> None:
    """Close a stream early; the request must end."""
    messages = [{"role": "user", "content": "Tell a long story."}]
    stream = ask(messages=messages, max_tokens=2000, stream=True, extra_body={"min_new_tokens": 2000})
    next(iter(stream))
    stream.close()
    wait_until(lambda: not any(running(url) for _ in range(8)), 30, "the request of a client that left ends")
    say("the request of a client that left has ended")


def replace(ask: Ask, command: psutil.Process) -> None:
    """Kill a replica while requests come; they are answered, and a new replica takes its place."""
    victim = replicas(command)[0]
    os.kill(victim.pid, signal.SIGKILL)
    started, number = time.monotonic(), 0
    while time.monotonic() - started < RETURN_SECONDS:
        streamed(ask, number, 4)
        number += 1
        if len(replicas(command)) == 2 and victim not in replicas(command):
            break
    else:
        raise SystemExit("the replica that was killed did not come back")
    say(f"a replica was killed, {number} requests were answered meanwhile, back in {time.monotonic() - started:.1f} s")


def replicas(command: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in command.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(child.cmdline()[:1]).startswith(REPLICA):
                found.append(child)
    return found


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # HTTPError is one
        return False


def running(url: str) -> float:
    """The number of requests that a replica answers now; the proxy chooses which."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(RUNNING))


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise SystemExit(f"{what}: not within {seconds:g} s")
        time.sleep(0.5)


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    bench()
