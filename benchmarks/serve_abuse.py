"""Clients that go away and clients that are slow: what the server keeps of them, and what others notice.

Starts ``cli.py serve`` on the demo and opens all connections over loopback. First 1,000 clients go away at random
points: in the queue, while their prompt is read, between two tokens, with the last one; streaming or not, with one to
eight answers or branches. Then 200 slow clients, which drip their headers, drip their body or hardly read, stand beside
a normal one. Takes some minutes.

    .venv/bin/python benchmarks/serve_abuse.py --json
"""

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from http_load import Answer, Client, Request
from http_loops import median
from serve_report import Check, ratio, verdicts
from serve_slow import SlowClients
from serve_workload import QUESTIONS, Workload
from served import ROOT, Served, demo_artifact, free_port, ours, processor, served

IN_USE = ("pos2d:num_requests_running", "pos2d:num_requests_waiting", "pos2d:kv_cache_usage_perc")
SETTLED = 15.0
# At once: more than the engine has rows, so that some are in the queue.
AT_ONCE = 24
# The server keeps the tokens of two contexts, each of 8192 tokens on the demo model.
FILLING_TOKENS, PROMPT_TOKENS = 18_000, 1000


@click.command()
@click.option("--artifact", type=click.Choice(["int8", "onnx"]), default="int8", show_default=True, help="Of the demo.")
@click.option("--disconnects", type=int, default=1000, show_default=True)
@click.option("--slow", type=int, default=200, show_default=True, help="Number of slow clients.")
@click.option("--serve-flag", "flags", multiple=True, help="A flag of `serve`, such as --threads=2.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--log", type=click.Path(path_type=Path), default=ROOT / "out" / "serve.log", show_default="out/serve.log"
)
@click.option("--json", "as_json", is_flag=True)
def bench(
    artifact: str, disconnects: int, slow: int, flags: Sequence[str], seed: int, log: Path, as_json: bool
) -> None:
    """Print what was in use afterwards, and each bar."""
    model, port = demo_artifact(artifact), free_port()
    work = Workload(model / "tokenizer.json", 64, 32, seed)
    figures: dict[str, Any] = {"processor": processor(), "artifact": artifact}
    with served(ours(model, port, flags), port, log) as server:
        checks = asyncio.run(_disconnects(server, work, disconnects, random.Random(seed), figures))
        checks += asyncio.run(_slow_clients(server, work, slow, figures))
        checks.append(Check("server alive", float(server.is_alive), at_least=1))
    if as_json:
        click.echo(json.dumps(figures | {"checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        click.echo("\n".join([*(f"{name}: {value}" for name, value in figures.items()), "", *verdicts(checks)]))


async def _disconnects(
    server: Served, work: Workload, count: int, draw: random.Random, figures: dict[str, Any]
) -> list[Check]:
    asked = work.request(work.text(64))
    client = Client(server.port)
    before = (await client.send(asked)).texts
    await _fill(client, work)
    await _go_away(server, work, max(count // 5, AT_ONCE), draw)  # until buffers and allocators have their size
    await _settle(server)
    memory = server.memory()
    reached = await _go_away(server, work, count, draw)
    settled = await _settle(server)
    drift = server.memory() / memory - 1
    after = (await client.send(asked)).texts
    figures |= {"disconnects": reached, "resident_mb": memory / 1e6, "settled_s": settled}
    wrong = sum(number for status, number in reached.items() if status not in ("0", "200", "429"))
    return [
        *(Check(f"{name} afterwards", server.metric(name), at_most=0) for name in IN_USE),
        Check("memory drift", drift, at_most=0.02),
        Check("statuses but 200 and 429", wrong, at_most=0),
        Check("the same answer before and after", float(before == after and bool(before)), at_least=1),
    ]


async def _fill(client: Client, work: Workload) -> None:
    """Answer long prompts until what is kept of earlier requests takes all the memory that it may."""
    for _ in range(FILLING_TOKENS // PROMPT_TOKENS):
        await client.send(work.request(work.text(PROMPT_TOKENS), 1))


async def _go_away(server: Served, work: Workload, count: int, draw: random.Random) -> dict[str, int]:
    """Go away from so many requests; how many had which status, ``0`` where none had come yet."""
    left = list(range(count))
    statuses: dict[str, int] = {}

    async def leaver() -> None:
        while left:
            left.pop()
            status = str((await _leave(server.port, work, draw)).status)
            statuses[status] = statuses.get(status, 0) + 1
            if status == "429":  # it was never let in, so another takes its place
                left.append(count)
                await asyncio.sleep(0.2)

    await asyncio.gather(*(leaver() for _ in range(AT_ONCE)))
    return statuses


async def _leave(port: int, work: Workload, draw: random.Random) -> Answer:
    """One request and its early end, at a point that ``draw`` chooses."""
    request = _request(work, draw)
    point = draw.choice(("queued", "prefill", "decode", "last"))
    if point == "queued":
        return await Client(port, limit=draw.uniform(0.0005, 0.02)).send(request)
    if point == "prefill":
        long = Request(request.path, request.body | {"prompt": work.text(400)})
        return await Client(port, limit=draw.uniform(0.005, 0.3)).send(long)
    if "stream" not in request.body:
        return await Client(port, limit=draw.uniform(0.02, 1.5)).send(request)
    branches = len(request.body.get("branches", ())) or request.body["n"]
    events = work.new_tokens * branches if point == "last" else draw.randint(1, work.new_tokens)
    return await Client(port).send(request, leave=lambda count: count >= events)


def _request(work: Workload, draw: random.Random) -> Request:
    branches = draw.randint(1, 8)
    several: dict[str, Any] = {"branches": list(QUESTIONS[:branches])}
    if draw.random() < 0.5:
        several = {"n": branches, "temperature": 1.0}
    request = work.request(work.text(48), **several)
    if draw.random() < 0.5:
        return request
    whole = {key: value for key, value in request.body.items() if key not in ("stream", "stream_options")}
    return Request(request.path, whole)


async def _settle(server: Served) -> float:
    """Seconds until nothing is in use; NaN where something still is after 15."""
    begin = time.perf_counter()
    while time.perf_counter() < begin + SETTLED:
        if all(server.metric(name) == 0 for name in IN_USE):
            return time.perf_counter() - begin
        await asyncio.sleep(0.05)
    return float("nan")


async def _slow_clients(server: Served, work: Workload, count: int, figures: dict[str, Any]) -> list[Check]:
    """A normal client's times before, beside and after the slow ones."""
    times = [await _normal(server, work)]
    slow = SlowClients(server.port, count, work.request(work.text(16), 4))
    crowd = asyncio.create_task(slow.run())
    await asyncio.sleep(3)
    await _settle(server)  # the slow readers' own answers
    beside = await _normal(server, work)
    connected = slow.connected
    crowd.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await crowd
    times.append(await _normal(server, work))
    quiet = sum(times) / 2
    figures |= {"alone_s": quiet, "beside_slow_s": beside, "slow_connections": connected}
    return [
        Check("a normal client beside slow ones / alone", ratio(beside, quiet), at_most=1.2),
        Check("slow clients connected meanwhile", connected, at_least=0.9 * count),
    ]


async def _normal(server: Served, work: Workload, requests: int = 10) -> float:
    """Median seconds of several requests, one after the other; NaN if one of them fails."""
    answers = [await Client(server.port).send(work.next()) for _ in range(requests)]
    return median(answer.ended - answer.sent for answer in answers) if all(a.is_whole for a in answers) else math.nan


if __name__ == "__main__":
    bench()
