"""What a user would pick instead, beside ours: llama.cpp, onnxruntime-genai, openvino-genai and transformers.

All run the same weights (a merge without 2D RoPE, which is a stock model), read the same P random ids and write N
greedy answers of G tokens each after them. Every peer is a process of its own; loading is timed with a fresh one in
every round, then all stay, idle, while they are asked in turns, and medians are taken. llama.cpp, openvino-genai and
ours read the prompt once for all answers, the others once for each. Beside the speeds stands how far the logits are
from transformers' in float32 over a text: the largest difference and the share of positions with the same first token.
A peer that cannot be made, or that crashes, loses its rows, with the reason in the table. Needs ``make peers``; what is
made for the peers stays in the cache.

    .venv/bin/python benchmarks/peers.py --model 0.5b -p 512 -g 64 -n 1,8,16
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from peer_inputs import BENCHMARKS, PEERS_PYTHON, ROOT, Input, make_models, prepare
from peer_process import Worker, WorkerError
from tokenizers import Tokenizer

THREADS = str(os.cpu_count())
IDLE = 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """One row's tool: how its worker is started, with the ``file`` in the cache that it runs."""

    name: str
    bits: int
    python: str
    worker: tuple[str, ...]
    file: str


def _peer(name: str, bits: int, kind: str, file: str) -> Entry:
    return Entry(name, bits, str(PEERS_PYTHON), ("peer_worker.py", kind, "--threads", THREADS), file)


def _transformers(dtype: str, bits: int) -> Entry:
    worker = ("peer_worker.py", "transformers", "--threads", THREADS, "--dtype", dtype)
    return Entry(f"transformers {dtype}", bits, sys.executable, worker, "plain")


def _ours(name: str, bits: int, file: str) -> Entry:
    return Entry(f"ours {name}", bits, sys.executable, ("our_worker.py",), file)


# Our variants: arguments of `export` by the file in the cache.
EXPORTS = {f"ours-{quant}": ("--format", "onnx", "--quant", quant) for quant in ("none", "int8", "int4")}
OURS = (
    _ours("onnx float32", 32, "ours-none"),
    _ours("onnx int8", 8, "ours-int8"),
    _ours("onnx int4", 4, "ours-int4"),
)
REFERENCE = _transformers("float32", 32)
ENTRIES = (
    *OURS,
    _peer("llama.cpp Q8_0", 8, "llama", "q8_0.gguf"),
    _peer("llama.cpp Q4_0", 4, "llama", "q4_0.gguf"),
    _peer("onnxruntime-genai int8", 8, "genai", "genai-int8"),
    _peer("onnxruntime-genai int4", 4, "genai", "genai-int4"),
    _peer("openvino-genai int8", 8, "openvino", "openvino-int8"),
    _peer("openvino-genai int4", 4, "openvino", "openvino-int4"),
    REFERENCE,
    _transformers("bfloat16", 16),
)


@dataclass(frozen=True, slots=True)
class Row:
    """``idle``: cores that the process took while others were timed; above 0, it slowed them."""

    peer: str
    bits: int
    answers: int
    prefill_s: float
    step_ms: float
    tok_s: float
    total_s: float
    import_s: float
    load_s: float
    first_token_s: float
    max_diff: float
    top1: float
    idle: float


@click.command()
@click.option("-m", "--model", type=click.Choice(["demo", "0.5b"]), default="demo", show_default=True)
@click.option("-p", "--prompt-tokens", type=int, default=512, show_default=True)
@click.option("-g", "--new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Of every answer.")
@click.option("-n", "--answers", default="1,8,16", show_default=True, help="Of one prompt, side by side.")
@click.option("-r", "--rounds", type=int, default=3, show_default=True)
@click.option("-e", "--only", multiple=True, help="Entries whose name has this; all by default.")
@click.option("--probe-tokens", type=int, default=128, show_default=True, help="Whose logits are compared.")
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / "out" / "peers", show_default="out/peers")
@click.option("--costs", is_flag=True, help="Print what making the files took, and time nothing.")
@click.option("--json", "as_json", is_flag=True)
def bench(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    answers: str,
    rounds: int,
    only: tuple[str, ...],
    probe_tokens: int,
    cache: Path,
    costs: bool,
    as_json: bool,
) -> None:
    """Make what is missing, run everybody, print a row for each and number of answers."""
    entries = [entry for entry in ENTRIES if not only or any(part in entry.name for part in only)]
    entries = entries if REFERENCE in entries else [*entries, REFERENCE]
    given = prepare(model, cache / model)
    files = [entry.file for entry in entries if entry.file != "plain"]
    made = make_models(given, {name: EXPORTS[name] for name in files if name in EXPORTS}, files)
    if costs:
        click.echo(json.dumps(made, indent=2) if as_json else _costs(made))
        return
    unmade = {name: str(facts["error"]) for name, facts in made.items() if "error" in facts}
    lost = {entry.name: f"not made: {unmade[entry.file]}" for entry in entries if entry.file in unmade}
    counts = [int(count) for count in answers.split(",")]
    runs = [entry for entry in entries if entry.name not in lost]
    rows = _rows(given, runs, prompt_tokens, new_tokens, counts, rounds, probe_tokens, lost)
    found = [asdict(row) for row in rows] + [{"peer": name, "lost": reason} for name, reason in lost.items()]
    click.echo(json.dumps(found, indent=2) if as_json else _table(rows, lost))


def _rows(
    given: Input,
    entries: Sequence[Entry],
    prompt: int,
    new: int,
    counts: Sequence[int],
    rounds: int,
    probe: int,
    lost: dict[str, str],
) -> list[Row]:
    """Time every entry; one whose worker ends early goes into ``lost`` with the reason, and the others go on."""
    starts: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    workers: dict[str, Worker] = {}
    replies: dict[tuple[str, int], list[dict[str, float]]] = {(e.name, n): [] for e in entries for n in counts}
    try:
        for last in [False] * (rounds - 1) + [True]:
            for entry in [entry for entry in entries if entry.name not in lost]:
                with _losing(entry.name, lost):
                    worker = _started(given, entry)
                    starts[entry.name].append(worker.started)
                    if last:
                        workers[entry.name] = worker
                    else:
                        worker.close()
        for turn in range(rounds):
            for count in counts:
                for name, worker in [pair for pair in workers.items() if pair[0] not in lost]:
                    request = {"prompt": prompt, "new": new, "answers": count, "seed": 100 * count + turn}
                    with _losing(name, lost):
                        replies[name, count].append(worker.ask(request))
        idle = {name: worker.idle() for name, worker in workers.items() if name not in lost}
        agreement = _agreement({n: w for n, w in workers.items() if n not in lost}, _text(given, probe), lost)
    finally:
        for worker in workers.values():
            worker.close()
    return [
        Row(
            peer=entry.name,
            bits=entry.bits,
            answers=count,
            **_medians(replies[entry.name, count]),
            **_medians(starts[entry.name]),
            max_diff=agreement[entry.name][0],
            top1=agreement[entry.name][1],
            idle=idle[entry.name],
        )
        for count in counts
        for entry in entries
        if entry.name not in lost
    ]


def _started(given: Input, entry: Entry) -> Worker:
    script, *arguments = entry.worker
    command = [entry.python, str(BENCHMARKS / script), *arguments, str(given.file(entry.file))]
    return Worker(command, given.place / "logs" / f"{entry.name}.log")


@contextmanager
def _losing(name: str, lost: dict[str, str]) -> Iterator[None]:
    """Record a worker that ends inside the block; the first reason stays."""
    try:
        yield
    except WorkerError as reason:
        lost.setdefault(name, str(reason))


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(facts[key] for facts in found) for key in found[0]}


def _text(given: Input, count: int) -> list[int]:
    """Ids of a text: a trained model is not sure of what follows random ones. The speeds are the same for both."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(given.plain / "tokenizer.json")).encode(text).ids
    return ids[:count]


def _agreement(workers: dict[str, Worker], ids: Sequence[int], lost: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Largest difference of logits to the reference, and the share of positions with the same first token.

    Both are NaN where the reference is lost.
    """
    with tempfile.TemporaryDirectory() as place:
        files = {name: Path(place) / f"{number}.npy" for number, name in enumerate(workers)}
        for name, worker in workers.items():
            with _losing(name, lost):
                worker.ask({"ids": list(ids), "save": str(files[name])})
        kept = [name for name in workers if name not in lost]
        if REFERENCE.name not in kept:
            return dict.fromkeys(kept, (float("nan"), float("nan")))
        true = np.load(files[REFERENCE.name])
        found: dict[str, tuple[float, float]] = {}
        for name in kept:
            logits = np.load(files[name])
            same = logits.argmax(-1) == true.argmax(-1)
            found[name] = float(np.abs(logits - true).max()), float(same.mean())
    return found


def _table(rows: Sequence[Row], lost: dict[str, str]) -> str:
    lines = [
        f"{'peer':24} {'bits':>4} {'answers':>7} {'prefill s':>9} {'ms/step':>8} {'tokens/s':>8} {'total s':>8} "
        f"{'load to first s':>15} {'max diff':>8} {'top-1':>6}"
    ]
    lines += [
        f"{row.peer:24} {row.bits:4} {row.answers:7} {row.prefill_s:9.3f} {row.step_ms:8.2f} {row.tok_s:8.1f} "
        f"{row.total_s:8.2f} {row.first_token_s:15.2f} {row.max_diff:8.2e} {row.top1:6.1%}"
        for row in rows
    ]
    lines += [f"{name:24} lost: {reason}" for name, reason in lost.items()]
    spun = {row.peer: row.idle for row in rows if row.idle > IDLE}
    lines += [f"{name} took {cores:.2f} cores while idle, which slowed the others" for name, cores in spun.items()]
    return "\n".join(lines)


def _costs(made: dict[str, dict[str, float]]) -> str:
    lines = [f"{'file':16} {'seconds':>8} {'peak GB':>8} {'file GB':>8}"]
    for name, facts in made.items():
        if "error" in facts:
            lines.append(f"{name:16} {facts['error']}")
        else:
            lines.append(f"{name:16} {facts['seconds']:8.1f} {facts['peak_gb']:8.2f} {facts['gb']:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    bench()
