"""How often each window was begun: one that ends every worker that answers it must end the run."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

# Ray gives the window of a worker that ended to another one, without a limit of its own.
MOST = 4


class Attempts:
    """An actor that counts; it lives as long as a handle to it."""

    def __init__(self) -> None:
        self._begun = Counter[int]()

    def begin(self, first: int) -> int:
        """Count one more attempt at the window that begins with line ``first``; return the number of attempts."""
        self._begun[first] += 1
        return self._begun[first]


@dataclass(frozen=True, slots=True)
class AttemptCounter:
    """What workers have of that actor: a function from the first line of a window to the number of attempts at it."""

    actor: Any

    @classmethod
    def start(cls) -> "AttemptCounter":
        import ray

        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        return cls(ray.remote(**options)(Attempts).remote())

    def __call__(self, first: int) -> int:
        import ray

        return int(ray.get(self.actor.begin.remote(first)))
