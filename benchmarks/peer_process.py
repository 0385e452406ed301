"""A worker process: asked in JSON lines, and watched for work that it does unasked."""

import contextlib
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil


class WorkerError(Exception):
    """A worker ended without an answer; the message says how, and names its log."""


class Worker:
    """``started`` is what it said of its loading.

    Raises:
        WorkerError: from every method that waits for an answer.
    """

    started: dict[str, Any]

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            )
        self._times = psutil.Process(self._process.pid)
        self._rested = self._worked = self._used = 0.0
        self.started = self._reply()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What it answers; nobody else is asked meanwhile."""
        self._count_rest()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None
        return self._reply()

    def idle(self) -> float:
        """Cores that it took on average since it started, between a reply and the next request."""
        self._count_rest()
        self._mark()
        return self._worked / self._rested if self._rested else 0.0

    def close(self) -> int:
        """End the process; returns its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._process.wait()
        self._process.stdout.close()
        return status

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._lost()
        self._mark()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self) -> WorkerError:
        status = self.close()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return WorkerError(f"it ended with {how}; see {self._log}")

    def _mark(self) -> None:
        self._since, self._used = time.perf_counter(), self._seconds()

    def _count_rest(self) -> None:
        self._rested += time.perf_counter() - self._since
        self._worked += self._seconds() - self._used

    def _seconds(self) -> float:
        try:
            times = self._times.cpu_times()
        except psutil.Error:  # it has ended, which the next reply reports
            return self._used
        return float(times.user + times.system)
