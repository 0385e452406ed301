"""What benchmarks/serve.py measures of a running server; every function takes seconds that it is bounded by."""

import asyncio
import itertools
import math
import random
import time
from dataclasses import dataclass

from http_load import Answer, Client
from http_loops import Load, closed_loop, counted_loop, median, offer, percentile
from serve_workload import Workload

BACK_TO_NORMAL = 3.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Milliseconds to the first token and between tokens, and throughput over all users."""

    users: int
    first_token_p50: float
    first_token_p95: float
    between_p50: float
    between_p95: float
    tokens_per_s: float
    requests_per_s: float
    failed: int


@dataclass(frozen=True, slots=True)
class Overload:
    """``refused`` answers of status 429, ``errors`` of any other than 200; ``back_s``: seconds after the load's end
    until a single request has its first token as soon as in quiet, NaN where it never had."""

    offered_per_s: float
    tokens_per_s: float
    answered: int
    refused: int
    errors: int
    refused_p99_ms: float
    refused_with_retry_after: int
    back_s: float


def pace(load: Load, users: int = 0) -> Pace:
    return Pace(
        users,
        1e3 * percentile(load.first_tokens, 50),
        1e3 * percentile(load.first_tokens, 95),
        1e3 * percentile(load.gaps, 50),
        1e3 * percentile(load.gaps, 95),
        load.tokens_per_s,
        load.requests_per_s,
        len(load.answers) - len(load.whole),
    )


async def steady(client: Client, work: Workload, users: int, seconds: float) -> Pace:
    """So many users, each with one request at a time."""
    return pace(await closed_loop(client, users, seconds, work.next), users)


async def offered(client: Client, work: Workload, rate: float, seconds: float) -> Pace:
    """Requests that come at random times, so many a second on average."""
    return pace(await (await offer(client, rate, seconds, work.next, random.Random(7))).answered())


async def newcomer(client: Client, work: Workload, writers: int, prompt_tokens: int) -> float:
    """Steps by which the longest wait of a writer exceeds the usual one while a long prompt is read.

    NaN unless all writers write before it comes and when it has its first token.
    """
    long = 8 * work.new_tokens
    # Nobody may end before the newcomer has its first token.
    requests = [work.request(work.text(32), long, min_new_tokens=long) for _ in range(writers)]
    sending = [asyncio.create_task(client.send(request)) for request in requests]
    await asyncio.sleep(3)
    arrived = time.perf_counter()
    late = await client.send(work.request(work.text(prompt_tokens), 4))
    answers = await asyncio.gather(*sending)
    if not late.token_times:
        return math.nan
    read = late.sent + late.first_token_s
    before = [_gaps(answer, 0, arrived)[2:] for answer in answers]
    meanwhile = [_gaps(answer, arrived, read) for answer in answers]
    still = all(answer.token_times[0][-1] > read for answer in answers if answer.token_times)
    if not still or not all(before) or not all(meanwhile):
        return math.nan
    return max(max(gaps) for gaps in meanwhile) / median(itertools.chain(*before)) - 1


def _gaps(answer: Answer, begin: float, end: float) -> list[float]:
    """Gaps that overlap a span of time."""
    times = answer.token_times.get(0, [])
    return [later - earlier for earlier, later in itertools.pairwise(times) if later > begin and earlier < end]


async def overload(client: Client, work: Workload, rate: float, seconds: float, quiet_ms: float) -> Overload:
    """Far more requests than can be answered; ``quiet_ms`` to the first token is what one user alone has."""
    requests = iter(work.several(int(1.3 * rate * seconds) + 50))
    sent = await offer(client, rate, seconds, lambda: next(requests), random.Random(11))
    back = await _back_to_normal(client, work, quiet_ms, sent.end)
    load = await sent.answered()
    refused = [answer for answer in load.answers if answer.status == 429]
    return Overload(
        rate,
        load.tokens_per_s,
        len(load.whole),
        len(refused),
        len(load.answers) - len(load.whole) - len(refused),
        1e3 * percentile([answer.ended - answer.sent for answer in refused], 99),
        sum("retry-after" in answer.headers for answer in refused),
        back,
    )


async def _back_to_normal(client: Client, work: Workload, quiet_ms: float, since: float, limit: float = 30) -> float:
    while time.perf_counter() < since + limit:
        asked = time.perf_counter()
        answer = await client.send(work.request(work.text(32), 8))
        if answer.is_whole and 1e3 * answer.first_token_s <= BACK_TO_NORMAL * quiet_ms:
            return asked - since
        await asyncio.sleep(0.25)
    return float("nan")


async def one_request_of_branches(client: Client, work: Workload, context_tokens: int, rounds: int) -> list[float]:
    """New tokens a second of a request of eight branches over a new context, reading it included."""
    speeds = []
    for _ in range(rounds):
        answer = await client.send(work.branches(context_tokens))
        speeds.append(answer.tokens / (answer.ended - answer.sent) if answer.is_whole else 0.0)
    return speeds


async def questions_as_requests(client: Client, work: Workload, context_tokens: int, rounds: int) -> list[float]:
    """The same, where every question is a request, all sent at once."""
    speeds = []
    for _ in range(rounds):
        load = await counted_loop(client, 8, work.questions(context_tokens))
        speeds.append(sum(answer.tokens for answer in load.whole) / (load.end - load.begin))
    return speeds
