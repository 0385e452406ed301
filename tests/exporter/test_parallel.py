"""Jobs on worker threads: results in order, and no thread that goes on after the block has ended."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pos2d.sources.files.parallel import limited_threads, submitted, thread_limit, worker_count


def test_results_come_in_the_order_of_the_jobs() -> None:
    def wait(seconds: float, name: str) -> str:
        time.sleep(seconds)
        return name

    with ThreadPoolExecutor(2) as workers, submitted(workers, wait, [(0.1, "slow"), (0.0, "fast")]) as results:
        assert list(results) == ["slow", "fast"]


@pytest.mark.parametrize("failing", ["job", "block"])
def test_a_failure_cancels_what_has_not_begun_and_awaits_the_rest(failing: str) -> None:
    begun, ended = [], []

    def work(number: int) -> int:
        begun.append(number)
        if number == 0 and failing == "job":
            raise ValueError(number)
        time.sleep(0.1)
        ended.append(number)
        return number

    def run(workers: ThreadPoolExecutor) -> None:
        with submitted(workers, work, [(number,) for number in range(50)]) as results:
            for result in results:
                raise ValueError(result)

    with ThreadPoolExecutor(2) as workers:
        with pytest.raises(ValueError, match="0"):
            run(workers)
        assert set(begun) - {0} <= set(ended)
        assert len(begun) < 10


def test_a_limit_holds_inside_its_block_for_our_threads_and_torchs() -> None:
    before, workers = torch.get_num_threads(), worker_count()
    with limited_threads(1):
        assert (torch.get_num_threads(), worker_count(), thread_limit()) == (1, 1, 1)
        with limited_threads(3):
            assert (torch.get_num_threads(), worker_count()) == (3, 3)
        assert worker_count() == 1
    assert (torch.get_num_threads(), worker_count(), thread_limit()) == (before, workers, None)
