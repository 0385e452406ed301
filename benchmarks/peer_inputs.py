"""The model that ours and the peers run: our merge, and its weights as a stock directory.

What the peers need stays in the cache; ours is made anew by every run, since its code is what changes.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from peer_models import MODELS, make
from random_bases import SHAPES, make_inputs

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
DEMO = ROOT / "demo" / "base"


@dataclass(frozen=True, slots=True)
class Input:
    """``place`` holds all that there is of one model: what is made for it in ``models``, beside ``merged`` and
    ``plain``."""

    place: Path

    @property
    def merged(self) -> Path:
        return self.place / "merged"

    @property
    def plain(self) -> Path:
        return self.place / "plain"

    def file(self, name: str) -> Path:
        return self.plain if name == "plain" else self.place / "models" / name


def prepare(model: str, place: Path) -> Input:
    """Base, merge and stock directory; a merge without 2D RoPE is exactly the stock model with other weights."""
    if not PEERS_PYTHON.exists() or not DEMO.exists():
        raise click.ClickException("run `make peers` and `make demo/base` first")
    given = Input(place.absolute())
    base, lora = DEMO, ROOT / "examples" / "demo_adapter" / "lora.pth"
    if model in SHAPES:
        inputs = given.place / "inputs"
        base, lora = inputs / "base", inputs / "lora.pth"
        if not (inputs / "peft" / "adapter_config.json").exists():
            shutil.rmtree(inputs, ignore_errors=True)
            inputs.mkdir(parents=True)
            # Not here: the peak of this process is where those of its children begin.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
                child.submit(make_inputs, inputs, SHAPES[model]).result()
    words = ["merge", "--base-model", str(base), "--lora", str(lora), "--no-patch-rope", "-o", str(given.merged)]
    facts = make([sys.executable, str(ROOT / "cli.py"), *words], given.merged, again=True)
    if "error" in facts:
        raise click.ClickException(f"the merge failed: {facts['error']}")
    if not (given.plain / "config.json").exists():
        given.plain.mkdir(exist_ok=True)
        for file in given.merged.glob("model*.safetensors*"):
            linked = given.plain / file.name
            linked.unlink(missing_ok=True)
            os.link(file, linked)
        # Converters want a tokenizer, and a random base has none; the benchmark speaks in ids.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, given.plain)
        shutil.copy(base / "config.json", given.plain)
    return given


def make_models(given: Input, exports: Mapping[str, Sequence[str]], files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What ``files`` took to make, by name, or why one cannot be made; ``exports`` are ours."""
    made: dict[str, dict[str, Any]] = {}
    for name, arguments in exports.items():
        out = given.file(name)
        words = ["export", str(given.merged), *arguments, "--no-verify", "-o", str(out)]
        made[name] = make([sys.executable, str(ROOT / "cli.py"), *words], out, again=True)
    wanted = [name for name in MODELS if name in files]
    if wanted:
        models = given.place / "models"
        command = [str(PEERS_PYTHON), str(BENCHMARKS / "peer_models.py"), str(given.plain), str(models)]
        found = subprocess.run([*command, "--only", *wanted], check=True, stdout=subprocess.PIPE, text=True)
        for line in found.stdout.splitlines():
            facts = json.loads(line)
            made[facts.pop("name")] = facts
    return made
