"""The rules of the house, held by walking its files."""

import ast
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# What a package may import of the others; ``pos2d`` itself stands for the contract.
PACKAGES = {
    "pos2d": set(),
    "exporter": {"pos2d"},
    "runtime": {"pos2d"},
    "compat": {"pos2d", "exporter", "runtime"},
    "commands": {"pos2d", "exporter", "runtime"},
}
# Where people come in: the contract's package shows what all others offer.
FACES = {"pos2d/__init__.py", "pos2d/__main__.py"}
MAX_LINES = 300
MAX_FUNCTION_LINES = 60


def sources(*packages: str) -> list[Path]:
    """The files of our packages, each once: below ``pos2d`` the others are links."""
    return [
        path
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    ]


def imported(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports, also inside functions, for type checkers alone, and by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            yield str(name.value) if isinstance(name, ast.Constant) else ast.unparse(name).strip("f'\"")


def package_of(module: str) -> str:
    """``exporter`` of ``pos2d.exporter.merge``, ``pos2d`` of a module of the contract, else the top-level name."""
    top, *below = module.split(".")
    return below[0] if top == "pos2d" and below and below[0] in PACKAGES else top


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    ours = {*PACKAGES, "examples", "benchmarks", "tests", "cli"}
    for path in sources(package):
        if path.relative_to(ROOT).as_posix() not in FACES:
            used = {package_of(module) for module in imported(path)} & ours
            assert used <= PACKAGES[package] | {package}, path


def test_the_runtime_comes_without_the_exporter() -> None:
    """``compat``, which may import it, does so only in a merge."""
    program = "import sys, pos2d.compat; sys.exit('pos2d.exporter' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_files_that_travel_import_nothing_of_ours() -> None:
    for path in (ROOT / "pos2d" / "hf").glob("*_pos2d.py"):
        assert {module.split(".")[0] for module in imported(path)} <= {"torch", "transformers"}


def test_the_shared_leaf_is_light() -> None:
    """``pos2d`` needs numpy only; torch and the rest are for those who use them."""
    for path in sources("pos2d"):
        if path.parent.name != "hf" and path.relative_to(ROOT).as_posix() not in FACES:
            used = {module.split(".")[0] for module in imported(path)}
            assert used <= sys.stdlib_module_names | {"numpy", "pos2d", "rich", "torch", "bitsandbytes"}, path


def test_files_and_functions_stay_small() -> None:
    for path in sources(*PACKAGES, "examples", "benchmarks"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize("room", ["exporter", "runtime"])
def test_a_room_shows_what_it_offers_in_order(room: str) -> None:
    module = importlib.import_module(f"pos2d.{room}")
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_error_has_the_exit_code_that_help_states() -> None:
    from pos2d import errors
    from pos2d.commands.shared.errors import EXIT_CODES

    tree = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.Pos2DError)]
    stated = {int(code) for code in re.findall(r"\b(\d+) ", EXIT_CODES)}
    assert {error.exit_code for error in tree} == stated - {0, 130, 141, 143}
    assert all(f"{error.__name__} " in (errors.__doc__ or "") for error in tree)


def test_flags_are_the_parameters_of_the_function_behind_them() -> None:
    from inspect import signature

    import exporter
    import runtime
    from pos2d.commands.main import command_of
    from pos2d.commands.terminal.chat import chat

    def parameters_of(function: Callable[..., Any]) -> set[str]:
        """Those of a typed dictionary in place of the keywords that it describes."""
        names = signature(function).parameters
        kinds = [p.annotation.__args__[0] for p in names.values() if p.kind is p.VAR_KEYWORD]
        return {*names, *(key for kind in kinds for key in kind.__annotations__)} - {"flags", "loading"}

    display_only = {"as_json", "jsonl", "list_presets", "mode"}
    code_only = {"on_event"}
    for name, function in (
        ("merge", exporter.merge),
        ("export", exporter.export),
        ("inspect", exporter.inspect),
        ("plan", exporter.plan),
        ("verify", runtime.verify),
        ("eval", runtime.evaluate),
        ("run", runtime.run),
        ("batch", runtime.batch),
        ("show-layout", runtime.show_layout),
        ("doctor", runtime.doctor),
    ):
        flags = {parameter.name for parameter in command_of(name).params}
        assert flags - display_only == parameters_of(function) - code_only, name
    assert parameters_of(chat) == parameters_of(runtime.run) - code_only - {"prompt"}


def test_help_answers_at_once() -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "--help"]
    subprocess.run(command, check=True, capture_output=True)
    times = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.monotonic() - started)
    assert min(times) < 0.5


def test_the_installed_command_is_the_same() -> None:
    installed = Path(sys.prefix) / "bin" / "pos2d"
    helps = [
        subprocess.run([*command, "merge", "--help"], check=True, capture_output=True, text=True, cwd="/").stdout
        for command in ([str(installed)], [sys.executable, str(ROOT / "cli.py")])
    ]
    assert helps[0] == helps[1].replace("cli.py", "pos2d")
