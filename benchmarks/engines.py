"""One branch in the engines that users have already: the same greedy tokens, chat template and stop tokens as ours?

The demo's adapter, trained with 2D RoPE, is merged into its base and exported for each engine: ``stock`` runs in
transformers and vLLM, ``gguf`` in llama.cpp, ``genai`` in onnxruntime-genai. Every engine is a process of its own, and
answers the same ids greedily; its tokens are compared with those of our runtime on torch in float32. Where two answers
part, both tokens are shown with their logits in that model. Logits within 1e-3 of each other are a tie, or, for an
engine that computes in 16 bits, as far apart as neighbours in float16. After a tie the engine is asked again behind the
expected token. The ids of plain texts and of a conversation of three turns come from the engine's own tokenizer and
chat template, and its own stop tokens have to end the answers.

The exit status is 1 where something differs without a tie, or an engine is missing; ``--skip`` leaves one out. SGLang
is not run: what it computes from the configuration is worked out from its published source (sglang_reading.py).
``make engines`` makes the environments and runs this.

    .venv/bin/python benchmarks/engines.py --skip vLLM --json
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import sglang_reading
from engine_agreement import TIE, Parting
from engine_check import Found, Reference, check
from engine_inputs import TEXTS, TURNS
from peer_inputs import BENCHMARKS, DEMO, PEERS_PYTHON, ROOT
from peer_models import make
from peer_process import Worker, WorkerError
from served import processor

ADAPTER = ROOT / "examples" / "demo_adapter" / "lora.pth"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
OLD_TRANSFORMERS = ROOT / ".venv" / "transformers-4.57"
MERGED = "merged"
# Arguments of `export` by the artifact's name.
EXPORTS = {
    "onnx": ("--format", "onnx"),
    "stock": ("--format", "stock"),
    "gguf": ("--format", "gguf"),
    "gguf-float32": ("--format", "gguf", "--dtype", "float32"),
    "genai": ("--format", "genai"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine: the ``kind`` of its worker, the artifact that it runs, and its python with a ``site`` of packages.

    ``bits`` are those of the weights and of the KV cache.
    """

    name: str
    kind: str
    artifact: str
    bits: int
    python: Path = Path(sys.executable)
    site: Path | None = None

    @property
    def missing(self) -> Path | None:
        return next((path for path in (self.python, self.site) if path is not None and not path.exists()), None)


REFERENCE = Entry("ours, torch", "ours", MERGED, 32)
ENTRIES = (
    Entry("ours, ONNX Runtime", "ours", "onnx", 32),
    Entry("transformers", "transformers", "stock", 32),
    Entry("transformers 4.57", "transformers", "stock", 32, site=OLD_TRANSFORMERS),
    Entry("vLLM", "vllm", "stock", 32, VLLM_PYTHON),
    Entry("llama.cpp F32", "llama", "gguf-float32", 32, PEERS_PYTHON),
    Entry("llama.cpp F16", "llama", "gguf", 16, PEERS_PYTHON),
    Entry("onnxruntime-genai", "genai", "genai", 32, PEERS_PYTHON),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of one engine, or why nothing was."""

    engine: str
    artifact: str
    bits: int
    version: str = ""
    found: Found | None = None
    lost: str | None = None

    @property
    def faults(self) -> list[str]:
        return [self.lost or "nothing was asked"] if self.found is None else self.found.faults


@click.command()
@click.option("-s", "--skip", multiple=True, metavar="NAME", help="Engines whose name has this are left out.")
@click.option("-g", "--new-tokens", type=click.IntRange(2), default=256, show_default=True, help="Of every answer.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default="all cores")
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / "out" / "engines", show_default="out/engines")
@click.option("--keep", is_flag=True, help="Run the artifacts that are there, instead of making them anew.")
@click.option("--json", "as_json", is_flag=True)
def compare(skip: tuple[str, ...], new_tokens: int, threads: int, cache: Path, keep: bool, as_json: bool) -> None:
    """Make the artifacts, ask every engine, print a row for each."""
    entries = [entry for entry in ENTRIES if not any(name.lower() in entry.name.lower() for name in skip)]
    place = cache.absolute()
    unmade = make_artifacts(place, {entry.artifact for entry in entries}, keep)
    rows = run(place, entries, new_tokens, threads, unmade)
    sglang = None if "stock" in unmade or not (place / "stock").exists() else sglang_difference(place)
    faults = {row.engine: row.faults for row in rows if row.faults}
    if sglang is not None and sglang > TIE:
        faults["SGLang"] = [f"its cosines and sines differ by {sglang:.1e}"]
    if as_json:
        facts = {"processor": processor(), "rows": [asdict(row) for row in rows]}
        sglang_facts = {"version": sglang_reading.VERSION, "run": False, "largest_difference": sglang}
        click.echo(json.dumps(facts | {"sglang": sglang_facts, "faults": faults}, indent=2))
    else:
        click.echo(table(rows, new_tokens, sglang))
    if faults:
        sys.exit(1)


def make_artifacts(place: Path, wanted: set[str], keep: bool) -> dict[str, str]:
    """Merge, and export what is ``wanted``; returns why some could not be made."""
    if not DEMO.exists():
        raise click.ClickException("run `make demo/base` first")
    merged = place / MERGED
    merge = ["merge", "--base-model", str(DEMO), "--lora", str(ADAPTER), "--rope-2d-ratio", "1.0", "-o", str(merged)]
    commands = {MERGED: merge}
    for name in [name for name in EXPORTS if name in wanted]:
        commands[name] = ["export", str(merged), *EXPORTS[name], "-o", str(place / name)]
    unmade: dict[str, str] = {}
    for name, words in commands.items():
        click.echo(f"making {name}, unless it is there" if keep else f"making {name}", err=True)
        facts = make([sys.executable, str(ROOT / "cli.py"), *words], place / name, again=not keep)
        if "error" in facts:
            unmade[name] = f"not made: {facts['error']}"
    if MERGED in unmade:
        raise click.ClickException(unmade[MERGED])
    return unmade


def run(place: Path, entries: Sequence[Entry], new: int, threads: int, unmade: dict[str, str]) -> list[Row]:
    """Our model first, which stays open, then the others one by one, each compared with it."""
    ours = started(place, REFERENCE, threads)
    try:
        click.echo(f"asking {REFERENCE.name}", err=True)
        reference = Reference(ours, new)
        rows = [Row(REFERENCE.name, MERGED, REFERENCE.bits, ours.started["version"], reference.itself())]
        for entry in entries:
            reason = unmade.get(entry.artifact)
            if entry.missing is not None:
                reason = f"{entry.missing} is missing; run `make engines`, or leave it out with --skip"
            if reason is not None:
                rows.append(Row(entry.name, entry.artifact, entry.bits, lost=reason))
                continue
            click.echo(f"asking {entry.name}", err=True)
            rows.append(asked(place, entry, reference, threads))
    finally:
        ours.close()
    return rows


def asked(place: Path, entry: Entry, reference: Reference, threads: int) -> Row:
    """The row of one engine, whose process ends with it."""
    try:
        worker = started(place, entry, threads)
        try:
            found = check(worker, reference, entry.bits)
        finally:
            worker.close()
    except WorkerError as reason:
        return Row(entry.name, entry.artifact, entry.bits, lost=str(reason))
    return Row(entry.name, entry.artifact, entry.bits, worker.started["version"], found)


def started(place: Path, entry: Entry, threads: int) -> Worker:
    words = [str(entry.python), str(BENCHMARKS / "engine_worker.py"), entry.kind, str(place / entry.artifact)]
    words += ["--threads", str(threads), "--bits", str(entry.bits)]
    words += ["--site", str(entry.site)] if entry.site else []
    return Worker(words, place / "logs" / f"{entry.name}.log")


def sglang_difference(place: Path) -> float:
    """How far SGLang's cosines and sines for the stock artifact are from those of the merged model in one branch."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from pos2d.spec import Rope2DSpec

    config = json.loads((place / "stock" / "config.json").read_text(encoding="utf-8"))
    merged = json.loads((place / MERGED / "config.json").read_text(encoding="utf-8"))
    settings: dict[str, Any] = AutoConfig.from_pretrained(place / "stock").rope_parameters
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(DEMO))
    ours = rotary.inv_freq.numpy(), float(rotary.attention_scaling)
    return sglang_reading.difference(config, settings, ours, Rope2DSpec.from_dict(merged["rope_2d"]))


def table(rows: Sequence[Row], new: int, sglang: float | None) -> str:
    """The rows for people, then every parting, then SGLang."""
    lines = [
        processor(),
        f"{'engine':20} {'version':9} {'artifact':12} {'bits':>4} {'equal tokens':>13} {'texts':>5} {'turns':>5} "
        f"{'stops':>5} {'tokens/s':>8}",
    ]
    for row in rows:
        start = f"{row.engine:20} {row.version:9} {row.artifact:12} {row.bits:4} "
        if row.found is None:
            lines.append(f"{start}lost: {row.lost}")
            continue
        found = row.found
        lines.append(
            f"{start}{found.equal:5} of {found.tokens:4} {found.texts:3}/{len(TEXTS)} {found.turns:3}/{len(TURNS)} "
            f"{found.stops:3}/{len(TURNS)} {found.tokens_per_second:8.1f}"
        )
    lines += [said(row.engine, parting) for row in rows if row.found for parting in row.found.partings]
    lines += [f"{row.engine}: {fault}" for row in rows if row.found for fault in row.found.faults]
    if sglang is not None:
        lines.append(
            f"SGLang {sglang_reading.VERSION} was not run; by its source, its cosines and sines for the stock artifact "
            f"differ from ours by {sglang:.1e} at most, over all positions"
        )
    return "\n".join(lines)


def said(engine: str, parting: Parting) -> str:
    place = f"{engine}, {parting.where}, token {parting.position}"
    if parting.expected_logit is None or parting.found_logit is None:
        return f"{place}: one of the two answers has ended (ours {parting.expected}, theirs {parting.found})"
    return (
        f"{place}: ours {parting.expected} with logit {parting.expected_logit:.5f}, theirs {parting.found} with "
        f"{parting.found_logit:.5f}; {parting.gap:.1e} apart{', a tie' if parting.tied else ''}"
    )


if __name__ == "__main__":
    compare()
