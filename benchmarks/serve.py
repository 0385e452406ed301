"""The server under load: pace of one user, of eight, at capacity and far beyond, beside llama-cpp-python's server.

Starts ``cli.py serve`` as a process of its own and sends it greedy requests over loopback, bounded in time. Every
request has a new prompt, so that no answer profits from the cache of another. Throughput of the same requests through
the engine in this process stands beside that over HTTP, and llama-cpp-python's server, with the same weights at eight
bits and the same requests, beside ours; both in turns. Agreement is the share of answers over HTTP, in company, that
are those of the model in process and alone. Needs ``make demo/base``, and ``make peers`` unless ``--no-peer``.

    .venv/bin/python benchmarks/serve.py --json
"""

import asyncio
import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import serve_measures as measures
from http_load import Client
from http_loops import counted_loop
from serve_inprocess import InProcess
from serve_peer import peer_command, peer_file
from serve_report import Check, ratio, table
from serve_workload import Workload
from served import ROOT, demo_artifact, free_port, ours, processor, served

USERS = 8
LOADS = (0.25, 0.5, 1.0)
AGREEING = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """``rows``: users at capacity, as many as the engine decodes at once; ``seconds`` of every load."""

    rows: int
    seconds: float
    rounds: int
    context_tokens: int
    threads: int


@dataclass(slots=True)
class Found:
    """The checks so far, and all figures that they come from."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@click.command()
@click.option("--artifact", type=click.Choice(["int8", "onnx"]), default="int8", show_default=True, help="Of the demo.")
@click.option("-p", "--prompt-tokens", type=int, default=64, show_default=True)
@click.option("-g", "--new-tokens", type=int, default=48, show_default=True)
@click.option("-c", "--context-tokens", type=int, default=512, show_default=True, help="Of the request of branches.")
@click.option("--rows", type=int, default=16, show_default=True, help="Branches that the engine decodes at once.")
@click.option("-s", "--seconds", type=float, default=20, show_default=True, help="Of every load; the overload has two.")
@click.option("-r", "--rounds", type=int, default=3, show_default=True, help="Of what is compared in turns.")
@click.option("--serve-flag", "flags", multiple=True, help="A flag of `serve`, such as --threads=2.")
@click.option("--threads", type=int, default=2, show_default=True, help="Of the peer.")
@click.option("--peer/--no-peer", default=True, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / "out" / "peers", show_default="out/peers")
@click.option("--json", "as_json", is_flag=True)
def bench(
    artifact: str,
    prompt_tokens: int,
    new_tokens: int,
    context_tokens: int,
    rows: int,
    seconds: float,
    rounds: int,
    flags: Sequence[str],
    threads: int,
    peer: bool,
    cache: Path,
    as_json: bool,
) -> None:
    """Start the servers, load them, and print what was found."""
    model = demo_artifact(artifact)
    file = peer_file(cache) if peer else None
    work = Workload(model / "tokenizer.json", prompt_tokens, new_tokens)
    settings = Settings(rows, seconds, rounds, context_tokens, threads)
    found = Found(figures={"processor": processor(), "artifact": artifact, "settings": asdict(settings)})
    port = free_port()
    with contextlib.ExitStack() as running:
        running.enter_context(served(ours(model, port, flags), port, cache / "logs" / "serve.log"))
        asyncio.run(_ours(Client(port), work, settings, model, found))
        if file is not None:
            other = free_port()
            command = peer_command(file, other, threads)
            running.enter_context(served(command, other, cache / "logs" / "llama_cpp_server.log", "/v1/models"))
            asyncio.run(_beside(Client(port), Client(other), work, settings, found))
    if as_json:
        click.echo(json.dumps(found.figures | {"checks": [check.as_dict() for check in found.checks]}, indent=2))
    else:
        click.echo(table(found.figures, found.checks))


async def _ours(client: Client, work: Workload, settings: Settings, model: Path, found: Found) -> None:
    await measures.steady(client, work, USERS, 3)  # warms it up
    one = await measures.steady(client, work, 1, settings.seconds / 2)
    eight = await measures.steady(client, work, USERS, settings.seconds)
    capacity = await measures.steady(client, work, settings.rows, settings.seconds)
    paces = {"one user": one, "eight users": eight, f"{settings.rows} users (C)": capacity}
    for share in LOADS:
        paces[f"{share:g}x offered"] = await measures.offered(
            client, work, share * capacity.requests_per_s, settings.seconds
        )
    found.figures["paces"] = {name: asdict(pace) for name, pace in paces.items()}
    found.checks += [
        Check("eight users / one, tokens/s", ratio(eight.tokens_per_s, one.tokens_per_s), at_least=3.0),
        Check(
            "p95 between tokens at 1x / one user", ratio(paces["1x offered"].between_p95, one.between_p95), at_most=1.5
        ),
        Check("failed requests up to 1x", sum(pace.failed for pace in paces.values()), at_most=0),
    ]
    waits = [await measures.newcomer(client, work, USERS, 1000) for _ in range(settings.rounds)]
    found.figures["newcomer_steps"] = waits
    found.checks.append(Check("steps that a prompt of 1,000 delays the others", max(waits), at_most=3.0))
    await _overhead(client, work, settings, model, found)
    await _overload(client, work, settings, capacity, one.first_token_p50, found)


async def _overhead(client: Client, work: Workload, settings: Settings, model: Path, found: Found) -> None:
    """Throughput over HTTP and in process, in turns; and whether both say the same."""
    inside = InProcess(model)
    http, process = [], []
    for _ in range(settings.rounds + 1):
        requests = work.several(3 * settings.rows)
        load = await counted_loop(client, settings.rows, requests)
        http.append(sum(answer.tokens for answer in load.whole) / (load.end - load.begin))
        process.append(await inside.tokens_per_s(settings.rows, requests))
    asked = work.several(AGREEING)
    company = await counted_loop(client, AGREEING, asked)
    same = sum(answer.texts.get(0) == inside.greedy(answer.request) for answer in company.answers)
    inside.close()
    lost = 1 - ratio(statistics.median(http[1:]), statistics.median(process[1:]))  # the first round warms up
    found.figures |= {"http_tokens_per_s": http[1:], "in_process_tokens_per_s": process[1:]}
    found.figures["agreement"] = f"{same} of {AGREEING}"
    found.checks += [
        Check("cost of HTTP and events, share of in-process tokens/s", lost, at_most=0.05),
        Check(f"answers in company as in process and alone, of {AGREEING}", same, at_least=AGREEING),
    ]


async def _overload(
    client: Client, work: Workload, settings: Settings, capacity: measures.Pace, quiet_ms: float, found: Found
) -> None:
    rate = 10 * capacity.requests_per_s
    over = await measures.overload(client, work, rate, 2 * settings.seconds, quiet_ms)
    found.figures["overload"] = asdict(over)
    found.checks += [
        Check("goodput at 10x / C", ratio(over.tokens_per_s, capacity.tokens_per_s), at_least=0.9),
        Check("p99 of a refusal at 10x, ms", over.refused_p99_ms, at_most=100),
        Check("neither answered nor refused at 10x", over.errors, at_most=0),
        Check("refused without Retry-After", over.refused - over.refused_with_retry_after, at_most=0),
        Check("back to normal after 10x, s", over.back_s, at_most=5),
    ]


async def _beside(client: Client, peer: Client, work: Workload, settings: Settings, found: Found) -> None:
    """Eight users, and eight questions over one context, of both servers in turns."""
    users: dict[str, list[measures.Pace]] = {"ours": [], "peer": []}
    questions: dict[str, list[float]] = {"ours": [], "peer": []}
    await measures.steady(peer, work, 1, 2)
    for _ in range(settings.rounds):
        for name, server in (("ours", client), ("peer", peer)):
            users[name].append(await measures.steady(server, work, USERS, settings.seconds / 2))
        questions["ours"] += await measures.one_request_of_branches(client, work, settings.context_tokens, 2)
        questions["peer"] += await measures.questions_as_requests(peer, work, settings.context_tokens, 2)
    speeds = {name: statistics.median(pace.tokens_per_s for pace in paces) for name, paces in users.items()}
    branches = {name: statistics.median(found) for name, found in questions.items()}
    found.figures["eight_users_tokens_per_s"] = speeds
    found.figures["eight_questions_tokens_per_s"] = branches
    found.checks += [
        Check("eight users: ours / llama-cpp-python", ratio(speeds["ours"], speeds["peer"]), at_least=1.5),
        Check("eight questions: ours / llama-cpp-python", ratio(branches["ours"], branches["peer"]), at_least=1.5),
    ]


if __name__ == "__main__":
    bench()
