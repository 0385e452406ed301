"""The code blocks of the README and the docs, and how they are run."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
# These pages and the others are run by different workers.
OF_USE = ("batch", "branches", "chat", "guide", "sampling")
# What an example of plain transformers has in its hands.
GIVEN = (
    "import torch\n"
    "input_ids = torch.tensor([[504, 3575, 282]]); position_ids = torch.arange(3)[None]\n"
    "pos2d = torch.stack([torch.zeros(1, 3, dtype=torch.long), position_ids], dim=-1)\n"
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # real models gain from more threads than the tests around them
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def run_blocks(place: Path, page: Path) -> None:
    """Run the blocks of a page; each page stands by itself, after the commands of the README."""
    text = page.read_text(encoding="utf-8")
    for shell in blocks("bash", text):
        done = run(place, ["bash", "-euo", "pipefail", "-c", f'PATH="$PWD/.venv/bin:$PATH"\n{shell}'])
        assert done.returncode == 0, done.stderr
    for program in blocks("python", text):
        done = run(place, [sys.executable, "-c", GIVEN + program])
        assert done.returncode == 0, done.stderr
