"""Every command of the pages about answers, run as it stands there on the real demo model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import OF_USE, PAGES, ROOT, blocks, run, run_blocks


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in OF_USE], ids=lambda page: page.stem)
def test_commands_of_the_page(workplace: Path, page: Path) -> None:
    run_blocks(workplace, page)


def test_requests_of_the_page_about_serving(workplace: Path) -> None:
    """Blocks of sh and py; the first one starts the server, here on a free port."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    start, *requests = blocks("sh", text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{workplace}/.venv/bin:{os.environ['PATH']}"}
    command = ["bash", "-c", f"exec {start.strip()} --port 0"]
    with subprocess.Popen(command, cwd=workplace, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            ready = next(filter(None, (re.search(r"^ready at http://(\S+)", line) for line in server.stderr)))
            answers = []
            for kind, block in (*(("bash", block) for block in requests), *(("python", b) for b in blocks("py", text))):
                asked = re.sub(r"(localhost|127\.0\.0\.1):8000", ready[1], block)
                program = [sys.executable, "-c"] if kind == "python" else ["bash", "-euo", "pipefail", "-c"]
                done = run(workplace, [*program, asked.replace("curl ", "curl -sf ").replace(": 100}", ": 10}")])
                assert done.returncode == 0, done.stderr
                answers.append(done.stdout)
        finally:
            server.kill()
    generated, branches, structured, written = answers
    assert json.loads(generated)["response"].startswith("你好")
    assert '"index": 1' in branches
    assert branches.endswith("data: [DONE]\n\n")
    choice = json.loads(structured)["choices"][0]
    assert choice["finish_reason"] == "length" or set(json.loads(choice["message"]["content"])) == {"legs"}
    assert written.strip()
