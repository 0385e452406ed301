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
ROOMS = {"pos2d": set(), "exporter": {"pos2d"}, "runtime": {"pos2d"}}
# A merge in memory, which programs for the trainer's script expect of one call, needs both sides at once.
EXCEPTIONS = {"runtime/compat.py": {"exporter"}}
MAX_LINES = 300
MAX_FUNCTION_LINES = 60


def sources(*rooms: str) -> list[Path]:
    return [*ROOT.glob("cli*.py"), *(path for room in rooms for path in sorted((ROOT / room).rglob("*.py")))]


def imported(path: Path) -> Iterator[str]:
    """Top-level names of every import in a file, those inside functions too; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_dependencies_point_one_way(room: str) -> None:
    ours = {*ROOMS, *(path.stem for path in ROOT.glob("cli*.py")), "examples", "benchmarks", "tests"}
    for path in sorted((ROOT / room).rglob("*.py")):
        allowed = ROOMS[room] | {room} | EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), set())
        assert set(imported(path)) & ours <= allowed, path


def test_the_runtime_comes_without_the_exporter() -> None:
    """``compat``, which may import it, does so only in a merge."""
    program = "import sys, runtime.compat; sys.exit('exporter' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_files_that_travel_import_nothing_of_ours() -> None:
    for path in (ROOT / "pos2d" / "hf").glob("*_pos2d.py"):
        assert set(imported(path)) <= {"torch", "transformers"}


def test_the_shared_leaf_is_light() -> None:
    """``pos2d`` needs numpy only; torch and the rest are for those who use them."""
    for path in (ROOT / "pos2d").glob("*.py"):
        assert set(imported(path)) <= sys.stdlib_module_names | {"numpy", "pos2d", "rich"}, path


def test_files_and_functions_stay_small() -> None:
    for path in sources("pos2d", "exporter", "runtime", "examples", "benchmarks"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize("room", ["exporter", "runtime"])
def test_a_room_shows_what_it_offers_in_order(room: str) -> None:
    module = importlib.import_module(room)
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_error_has_the_exit_code_that_help_states() -> None:
    from cli_errors import EXIT_CODES
    from pos2d import errors

    tree = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.Pos2DError)]
    stated = {int(code) for code in re.findall(r"\b(\d+) ", EXIT_CODES)}
    assert {error.exit_code for error in tree} == stated - {0, 130, 141, 143}
    assert all(f"{error.__name__} " in (errors.__doc__ or "") for error in tree)


def test_flags_are_the_parameters_of_the_function_behind_them() -> None:
    from inspect import signature

    import exporter
    import runtime
    from cli import cli

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
        flags = {parameter.name for parameter in cli.commands[name].params}
        assert flags - display_only == parameters_of(function) - code_only, name
    assert parameters_of(runtime.chat) == parameters_of(runtime.run) - code_only - {"prompt"}


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
