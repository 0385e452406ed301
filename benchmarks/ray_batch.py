"""A batch on workers of Ray against the local engine: the same bytes, what one worker costs, and what two gain.

The same lines are answered by the local engine with all threads and with half of them, by one worker of Ray with each,
and by two workers with half of the threads each; then by two workers of which one is killed when the first records are
there. Every run is a process of its own. ``seconds`` are those of the whole command; ``lines/s`` are those between the
loaded model and the last record for the local engine, and with the start of the workers for Ray. The exit code is 1 if
any output differs. Needs ``pip install 'pos2d[ray]'``.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil

from pos2d.commands.shared.tables import table
from pos2d.threads import usable_cores

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("What is a volcano?", "Name three colours.", "Why is the sky blue?", "Who wrote Hamlet?")
WORKER = "ray::MapWorker"


@dataclass(frozen=True, slots=True)
class Run:
    """One command; ``kills`` says that it loses a worker."""

    name: str
    flags: tuple[str, ...]
    kills: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """``seconds`` of the whole command, of which the engine ``answered`` for some; ``same`` bytes as the first run."""

    name: str
    seconds: float
    answered: float
    lines_per_second: float
    same: bool


@click.command()
@click.argument("model", default=str(ROOT / "demo" / "int8"))
@click.option("-l", "--lines", default=1280, show_default=True, help="Number of lines; 64 go to a worker at a time.")
@click.option("-n", "--new-tokens", default=64, show_default=True, help="New tokens of each line.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench(model: str, lines: int, new_tokens: int, as_json: bool) -> None:
    """Compare the local engine with workers of Ray on MODEL."""
    with tempfile.TemporaryDirectory() as directory:
        rows = list(measured(model, Path(directory), lines, new_tokens))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        cells = [
            (row.name, f"{row.seconds:.1f}", f"{row.lines_per_second:.1f}", "yes" if row.same else "no") for row in rows
        ]
        click.echo(table(("engine", "seconds", "lines/s", "same bytes"), cells))
    sys.exit(not all(row.same for row in rows))


def runs() -> tuple[Run, ...]:
    """The runs, the first of which is the reference."""
    cores = usable_cores()
    half = max(1, cores // 2)
    two = ("--engine", "ray", "--num-workers", "2", "--threads", str(half))
    return (
        Run(f"local, {cores} threads", ("--threads", str(cores))),
        Run(f"local, {half} threads", ("--threads", str(half))),
        Run(f"ray, 1 worker of {cores} threads", ("--engine", "ray", "--num-workers", "1", "--threads", str(cores))),
        Run(f"ray, 1 worker of {half} threads", ("--engine", "ray", "--num-workers", "1", "--threads", str(half))),
        Run(f"ray, 2 workers of {half} threads", two),
        Run(f"ray, 2 workers of {half} threads, one killed", two, kills=True),
    )


def measured(model: str, place: Path, lines: int, new_tokens: int) -> Iterator[Row]:
    source = place / "in.jsonl"
    source.write_text("".join(json.dumps(line_of(number)) + "\n" for number in range(lines)), encoding="utf-8")
    reference: bytes | None = None
    for number, run in enumerate(runs()):
        output = place / f"out{number}.jsonl"
        started = time.monotonic()
        report = answered(model, source, output, new_tokens, run)
        seconds = time.monotonic() - started
        reference = output.read_bytes() if reference is None else reference
        same = output.read_bytes() == reference
        click.echo(f"{run.name}: {seconds:.1f} s", err=True)
        yield Row(run.name, seconds, report["seconds"], lines / report["seconds"], same)


def line_of(number: int) -> dict[str, object]:
    """A line of its own, every third sampled."""
    sampled = {"temperature": 0.9, "seed": number} if number % 3 == 1 else {}
    return {"id": f"q{number}", "prompt": f"{QUESTIONS[number % len(QUESTIONS)]} ({number})", **sampled}


def answered(model: str, source: Path, output: Path, new_tokens: int, run: Run) -> dict[str, float]:
    """Run the command, and kill one of its workers if the run says so; return its report."""
    arguments = ["batch", model, "-i", str(source), "-o", str(output), "-n", str(new_tokens), "--json", *run.flags]
    with subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *arguments], stdout=subprocess.PIPE) as process:
        if run.kills:
            kill_worker(psutil.Process(process.pid), Path(f"{output}.partial"))
        assert process.stdout is not None
        report: dict[str, float] = json.loads(process.stdout.read())
    if process.returncode:
        raise SystemExit(f"{run.name} ended with {process.returncode}")
    return report


def kill_worker(command: psutil.Process, partial: Path) -> None:
    """SIGKILL a worker of the command once there are records, while it answers further lines."""
    while command.is_running() and command.status() != psutil.STATUS_ZOMBIE:
        if partial.exists() and partial.stat().st_size:
            for child in command.children(recursive=True):
                try:
                    name = " ".join(child.cmdline()[:1])
                except psutil.Error:
                    continue
                if name.startswith(WORKER):
                    os.kill(child.pid, signal.SIGKILL)
                    click.echo(f"killed the worker with process id {child.pid}", err=True)
                    return
        time.sleep(0.05)
    raise SystemExit("the batch ended before a worker could be killed; give more lines")


if __name__ == "__main__":
    bench()
