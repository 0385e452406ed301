"""What an installation looks like: one name, nothing of the current directory, the same program by every way in."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pos2d
from pos2d import exporter
from pos2d.exporter.artifact.closing_check import run_verb
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
# Names of ours and of packages that we import: as files beside a user's work they must never run.
PLANTED = (
    "cli",
    "commands",
    "exporter",
    "runtime",
    "sources",
    "compat",
    "pos2d",
    "torch",
    "numpy",
    "onnxruntime",
    "json",
    "click",
)
WAYS_IN = {
    "installed": [str(Path(sys.prefix) / "bin" / "pos2d")],
    "checkout": [sys.executable, str(ROOT / "cli.py")],
    "module": [sys.executable, "-P", "-m", "pos2d"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files of our wheel."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_everything_is_installed_below_one_name(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pos2d"}


def test_the_wheel_has_every_file_of_every_package(wheel: list[str]) -> None:
    for folder in ("commands", "compat", "exporter", "runtime", "sources"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"pos2d/{path.relative_to(ROOT).as_posix()}" in wheel
    for path in (ROOT / "pos2d").rglob("*.py"):
        if not any(parent.is_symlink() for parent in path.parents):
            assert path.relative_to(ROOT).as_posix() in wheel
    assert "pos2d/py.typed" in wheel
    page = list((ROOT / "runtime" / "http" / "page").iterdir())
    assert page
    assert {f"pos2d/runtime/http/page/{path.name}" for path in page} <= set(wheel)


def test_the_face_offers_what_it_lists() -> None:
    assert list(pos2d.__all__) == sorted(pos2d.__all__)
    assert set(dir(pos2d)) == set(pos2d.__all__)
    for name in pos2d.__all__:
        assert getattr(pos2d, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'merg'"):
        getattr(pos2d, "merg")  # noqa: B009


def test_importing_the_face_imports_no_library() -> None:
    program = "import sys, pos2d; sys.exit(bool({'numpy', 'torch', 'click', 'rich', 'onnxruntime'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_every_way_in_is_the_same_program() -> None:
    pages = {
        name: subprocess.run([*command, "merge", "--help"], check=True, capture_output=True, text=True, cwd="/").stdout
        for name, command in WAYS_IN.items()
    }
    names = {"installed": "pos2d", "checkout": "cli.py", "module": "python -m pos2d"}
    assert len({page.removeprefix(f"Usage: {names[way]} ") for way, page in pages.items()}) == 1


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, an adapter, and a file for every name, which would leave a mark if it were run."""
    place = tmp_path_factory.mktemp("workplace")
    base = write_base(place / "base", CONFIGS["llama"])
    write_tokenizer(base, chat=True)
    write_adapter(place / "lora.pth", random_adapter(linear_modules(base)))
    for name in PLANTED:
        (place / f"{name}.py").write_text(f"open({str(place / 'RAN')!r}, 'a').write({name!r})\n", encoding="utf-8")
    return place


@pytest.mark.parametrize("way", WAYS_IN)
def test_nothing_of_the_current_directory_is_run(workplace: Path, way: str) -> None:
    """Also where PYTHONPATH names it: our own processes look there last."""
    base = ["--base-model", "base", "--lora", "lora.pth", "--rope-2d-ratio", "0.5"]
    verbs: list[list[str]] = [
        ["doctor"],
        ["inspect", "lora.pth", "--base-model", "base"],
        ["plan", "base"],
        ["merge", *base, "-o", f"{way}-merged"],
        ["export", f"{way}-merged", "-o", f"{way}-onnx"],
        ["export", *base, "--format", "bnb", "--quant", "8bit", "-o", f"{way}-bnb"],
        ["show-layout", f"{way}-onnx", "-p", "one", "-p", "two"],
        ["run", f"{way}-onnx", "-p", "one", "-n", "2"],
        ["batch", f"{way}-onnx", "-i", "lines.jsonl", "-o", f"{way}-out.jsonl", "-n", "2"],
        ["verify", f"{way}-onnx", "--against", f"{way}-merged"],
        ["eval", f"{way}-onnx", "--text", "text.jsonl"],
        ["bench", f"{way}-onnx", "--prompt-tokens", "4", "--new-tokens", "2", "--branches", "1", "--rounds", "1"],
    ]
    (workplace / "lines.jsonl").write_text('{"prompt": "one"}\n', encoding="utf-8")
    (workplace / "text.jsonl").write_text('{"prompt": "one", "answer": "two"}\n', encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The ways in differ only in how the command line is found.
    chosen = (
        verbs if way == "installed" else [verb for verb in verbs if verb[0] in ("doctor", "merge", "export", "run")]
    )
    for verb in chosen:
        done = subprocess.run([*WAYS_IN[way], *verb], cwd=workplace, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (verb, done.stderr)
        assert not (workplace / "RAN").exists(), (verb, (workplace / "RAN").read_text())


def test_a_module_run_by_name_does_not_search_the_current_directory(tmp_path: Path) -> None:
    """But for its own name, which Python looks up there itself."""
    for name in {*PLANTED, "typing", "collections", "dataclasses", "subprocess"} - {"pos2d"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'a')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pos2d", "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "RAN").exists()


def test_an_export_ends_well_where_the_path_of_python_names_the_directory(workplace: Path) -> None:
    """The parent process searches PYTHONPATH first, as Python does; the process that checks the export does not."""
    exporter.merge(workplace / "base", workplace / "lora.pth", workplace / "merged", rope_2d_ratio=0.5)
    program = (
        f"import sys; sys.path.remove({str(workplace)!r})\n"
        "sys.argv = ['pos2d', 'export', 'merged', '-o', 'onnx']\n"
        "from pos2d.commands.main import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(workplace)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (workplace / "RAN").exists(), (workplace / "RAN").read_text()


def test_the_check_runs_the_copy_of_the_package_that_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not another copy that is installed."""
    (tmp_path / "pos2d" / "commands").mkdir(parents=True)
    for name in ("pos2d", "pos2d/commands"):
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "pos2d" / "commands" / "main.py").write_text("def main(): print('this copy')", encoding="utf-8")
    monkeypatch.setattr(pos2d, "__file__", str(tmp_path / "pos2d" / "__init__.py"))
    assert run_verb().stdout == "this copy\n"
