"""Closed and open loops of requests, and what their answers say together."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from http_load import Answer, Client, Request

# The next request of a load.
Next = Callable[[], Request]


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """The answers to a load, and the span in which it was in full swing."""

    answers: Sequence[Answer]
    begin: float
    end: float

    @property
    def whole(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.is_whole]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of whole answers that came in the span."""
        return sum(answer.tokens_between(self.begin, self.end) for answer in self.whole) / (self.end - self.begin)

    @property
    def requests_per_s(self) -> float:
        """Answers in the span, by the share of their tokens that came in it."""
        shares = [answer.tokens_between(self.begin, self.end) / max(answer.tokens, 1) for answer in self.whole]
        return sum(shares) / (self.end - self.begin)

    @property
    def gaps(self) -> list[float]:
        return [gap for answer in self.whole for gap in answer.gaps]

    @property
    def first_tokens(self) -> list[float]:
        return [answer.first_token_s for answer in self.whole]

    def statuses(self) -> dict[int, int]:
        """How many answers have each status; 0 are those that never came."""
        found: dict[int, int] = {}
        for answer in self.answers:
            found[answer.status] = found.get(answer.status, 0) + 1
        return found


async def closed_loop(client: Client, users: int, seconds: float, next_request: Next) -> Load:
    """Every user sends the next request when the last one is answered; the first quarter of the time is not counted."""
    begin = time.perf_counter()
    end = begin + seconds

    async def user() -> list[Answer]:
        answers = []
        while time.perf_counter() < end:
            answers.append(await client.send(next_request()))
            if answers[-1].status != 200:
                await asyncio.sleep(0.1)
        return answers

    lists = await asyncio.gather(*(user() for _ in range(users)))
    return Load([answer for list_ in lists for answer in list_], begin + seconds / 4, end)


async def counted_loop(client: Client, users: int, requests: Sequence[Request]) -> Load:
    """Answer every one of ``requests``, so many at a time; the span is that of all of them."""
    waiting = list(reversed(requests))

    async def user() -> list[Answer]:
        return [await client.send(waiting.pop()) for _ in iter(lambda: bool(waiting), False)]

    begin = time.perf_counter()
    lists = await asyncio.gather(*(user() for _ in range(users)))
    return Load([answer for list_ in lists for answer in list_], begin, time.perf_counter())


@dataclass(frozen=True, slots=True, eq=False)
class Offered:
    """A load that was sent and is not answered yet."""

    sending: Sequence[asyncio.Task[Answer]]
    begin: float
    end: float

    async def answered(self) -> Load:
        """Wait for all answers; the first quarter of the time is not counted."""
        begin = self.begin + (self.end - self.begin) / 4
        return Load(await asyncio.gather(*self.sending), begin, self.end)


async def offer(client: Client, rate: float, seconds: float, next_request: Next, draw: random.Random) -> Offered:
    """Requests come at ``rate`` a second, independently of each other (Poisson), whether the server keeps up or not."""
    begin = due = time.perf_counter()
    end = begin + seconds
    sending = []
    while (due := due + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        sending.append(asyncio.create_task(client.send(next_request())))
    await asyncio.sleep(max(end - time.perf_counter(), 0))
    return Offered(sending, begin, end)


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest rank; NaN without values."""
    found = sorted(values)
    return found[min(int(len(found) * percent / 100), len(found) - 1)] if found else float("nan")


def median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")
