"""What the README and the docs state of flags, links, targets, exit codes and figures."""

import re
import subprocess
import sys

import pytest

from tests.docs.pages import PAGES, README, ROOT

# Lines with programs that have flags of their own.
OTHER_PROGRAMS = r".*(hf download |python benchmarks/|pip install|systemctl |docker run |curl ).*"
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def test_the_retention_table_is_what_its_script_makes() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "retention.py")]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stated = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    assert made.splitlines()[0] in stated
    cells = [re.findall(r"(\d+)% \((\S+)\)", text) for text in (made, stated)]
    assert len(cells[0]) == len(cells[1]) == 16
    for now, then in zip(*cells, strict=True):
        assert abs(int(now[0]) - int(then[0])) <= 1  # another processor may draw the last digit differently
        assert float(now[1]) == pytest.approx(float(then[1]), rel=0.1)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for path in DOCS for target in re.findall(r"\bmake ([a-z-]+)", path.read_text(encoding="utf-8"))}
    assert {"demo", "test"} <= named
    for target in named - {"it", "sure"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for path in DOCS:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_flags_in_the_docs_exist() -> None:
    from pos2d.commands.main import COMMANDS, command_of

    flags = {name for verb in COMMANDS for p in command_of(verb).params for name in p.opts} | {
        "--help",
        "--strict",
        "--pe",  # of ParallelMind's scripts
    }
    for path in DOCS:
        ours = re.sub(OTHER_PROGRAMS, "", path.read_text(encoding="utf-8"))
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", ours):
            assert flag.replace("_", "-") in flags, f"{path.name}: {flag}"


def test_exit_codes_are_those_of_the_command_line() -> None:
    from pos2d.commands.shared.errors import EXIT_CODES

    stated = re.findall(r"^\| (\d+) \| (.+) \|$", README, flags=re.MULTILINE)
    assert ", ".join(f"{code} {meaning}" for code, meaning in stated) in EXIT_CODES
