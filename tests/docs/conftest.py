"""Directories in which the commands of the README were run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.docs.pages import ROOT, blocks, run


@pytest.fixture(scope="session")
def after_readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base and the demo adapter, and what the shell block of the README made of them.

    What it printed is in ``printed``. The workers share the directory, so nobody may change it.
    """
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "after_readme"
    with FileLock(place.with_suffix(".lock")):
        if not (place / "printed").exists():
            _make(place)
    return place


@pytest.fixture(scope="module")
def workplace(after_readme: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``after_readme``, of links to its files."""
    place = tmp_path_factory.mktemp("docs") / "place"
    subprocess.run(["cp", "-al", str(after_readme), str(place)], check=True)
    return place


def _make(place: Path) -> None:
    base = ROOT / "demo" / "base"
    subprocess.run([sys.executable, str(ROOT / "examples" / "get_demo_model.py"), "-o", str(base)], check=True)
    (place / "demo").mkdir(parents=True)
    (place / "demo" / "base").symlink_to(base)
    (place / "examples").symlink_to(ROOT / "examples")
    (place / ".venv").symlink_to(sys.prefix)
    _, shell = blocks("bash")
    done = run(place, ["bash", "-euo", "pipefail", "-c", shell])
    assert done.returncode == 0, done.stderr
    (place / "printed").write_text(done.stdout, encoding="utf-8")
