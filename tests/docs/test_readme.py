"""Every command of the README and of the docs, run as it stands there on the real demo model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What an example of plain transformers has in its hands.
GIVEN = (
    "import torch\n"
    "input_ids = torch.tensor([[504, 3575, 282]]); position_ids = torch.arange(3)[None]\n"
    "pos2d = torch.stack([torch.zeros(1, 3, dtype=torch.long), position_ids], dim=-1)\n"
)
# One branch of the demo model in plain transformers: of 256 greedy tokens of ours, it would have written each.
ONE_BRANCH = """
import pos2d, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("my/stock"), AutoTokenizer.from_pretrained("my/stock")
question = [{"role": "user", "content": "What is a volcano?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
answer = list(pos2d.load("my/onnx").generate("What is a volcano?", max_new_tokens=256)[0].token_ids)
with torch.no_grad():
    logits = model(torch.tensor([prompt + answer])).logits[0]
assert len(answer) == 256
assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
assert type(model).__name__ == "LlamaForCausalLM"
"""
# Lines with programs that have flags of their own.
OTHER_PROGRAMS = r".*(python benchmarks/|pip install|systemctl |docker run |curl ).*"
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo base and the demo adapter where the README says they are."""
    place = tmp_path_factory.mktemp("readme")
    made = ROOT / "demo" / "base"
    subprocess.run([sys.executable, str(ROOT / "examples" / "get_demo_model.py"), "-o", str(made)], check=True)
    (place / "demo").mkdir()
    (place / "demo" / "base").symlink_to(made)
    (place / "examples").symlink_to(ROOT / "examples")
    (place / ".venv").symlink_to(sys.prefix)
    return place


def run(place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # real models gain from more threads than the tests around them
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_commands_and_then_python(workplace: Path) -> None:
    """The shell block first: the Python blocks use what it makes."""
    _, shell = blocks("bash")
    done = run(workplace, ["bash", "-euo", "pipefail", "-c", shell])
    assert done.returncode == 0, done.stderr
    assert "[2] What does a baker do?" in done.stdout
    assert done.stdout.rstrip().endswith("passed")

    plain, library = blocks("python")
    done = run(workplace, [sys.executable, "-c", ONE_BRANCH])
    assert done.returncode == 0, done.stderr
    subprocess.run(["rm", "-r", "my/onnx"], cwd=workplace, check=True)
    merged_anew = library.replace('"my/merged"', '"my/merged2"')
    for program in (GIVEN + plain.replace("generate(input_ids)", "generate(input_ids, max_new_tokens=3)"), merged_anew):
        done = run(workplace, [sys.executable, "-c", program])
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_commands_of_the_docs(workplace: Path, path: Path) -> None:
    """Every page stands by itself, after the commands of the README."""
    text = path.read_text(encoding="utf-8")
    for shell in blocks("bash", text):
        done = run(workplace, ["bash", "-euo", "pipefail", "-c", f'PATH="$PWD/.venv/bin:$PATH"\n{shell}'])
        assert done.returncode == 0, done.stderr
    for program in blocks("python", text):
        done = run(workplace, [sys.executable, "-c", GIVEN + program])
        assert done.returncode == 0, done.stderr


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
