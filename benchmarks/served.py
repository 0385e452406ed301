"""A server as a process of its own: started, awaited, watched and stopped."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, limit: float = 5.0, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Status and body of a GET request; status 0 where there is no answer."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=limit)
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """Sum over all labels of a metric; NaN where it is not exposed."""
        _, text = self.get("/metrics")
        lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else float("nan")

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        process = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


@contextmanager
def served(command: Sequence[str], port: int, log: Path, ready: str = "/ready", limit: float = 180) -> Iterator[Served]:
    """Start ``command``, wait until it answers ``ready``, and stop it at the end.

    Raises:
        click.ClickException: it ended, or did not answer in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | OFFLINE, cwd=ROOT)
    server = Served(port, process, log)
    try:
        deadline = time.monotonic() + limit
        while server.get(ready)[0] != 200:
            if not server.is_alive or time.monotonic() > deadline:
                raise click.ClickException(f"{command[1:4]} is not ready; the end of {log}:\n{tail(log)}")
            time.sleep(0.2)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], limit: float = 30) -> int:
    """End a process with SIGTERM, and with SIGKILL if it takes too long; returns its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def ours(artifact: Path, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command that serves an artifact."""
    words = ["serve", str(artifact), "--host", HOST, "--port", str(port), *flags]
    return [sys.executable, str(ROOT / "cli.py"), *words]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def processor() -> str:
    """Name and number of the cores that this run may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {len(psutil.Process().cpu_affinity() or ())} cores"


def demo_artifact(name: str) -> Path:
    """``demo/onnx`` or ``demo/int8``, made with the command line where it is missing."""
    demo = ROOT / "demo"
    steps = {
        "base": [sys.executable, str(ROOT / "examples" / "get_demo_model.py")],
        "merged": [
            *(sys.executable, str(ROOT / "cli.py"), "merge", "--base-model", str(demo / "base")),
            *("--lora", str(ROOT / "examples" / "demo_adapter" / "lora.pth"), "--rope-2d-ratio", "1.0"),
        ],
        "onnx": [sys.executable, str(ROOT / "cli.py"), "export", str(demo / "merged"), "--format", "onnx"],
    }
    steps["int8"] = [*steps["onnx"], "--quant", "int8"]
    for step in ("base", "merged", name):
        if not (demo / step).exists():
            subprocess.run([*steps[step], "-o", str(demo / step)], check=True, stdout=subprocess.DEVNULL)
    return demo / name
