"""The rules of the architecture, checked on the files themselves."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def load_script(path: Path) -> Any:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architecture = load_script(ROOT / "docs" / "draw_architecture.py")
PACKAGES = ("pos2d", *architecture.LAYERS)
# The public face: the package of the contract offers what all others define.
FACES = {"pos2d/__init__.py", "pos2d/__main__.py"}
MAX_LINES = 300
MAX_FUNCTION_LINES = 60


def contract() -> list[Path]:
    """The files of the contract, without those that travel in artifacts and the package's face."""
    return [
        path
        for path in architecture.sources("pos2d")
        if path.parent.name != "hf" and path.relative_to(ROOT).as_posix() not in FACES
    ]


def test_every_folder_is_a_subpackage_with_a_place_among_the_layers() -> None:
    for package, layers in architecture.LAYERS.items():
        folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}
        assert folders == set(layers) - {architecture.VERBS}


def test_imports_point_downwards() -> None:
    """Between packages and subpackages; imports inside functions and for type checkers alone count."""
    upwards = {edge: files for edge, files in architecture.edges().items() if not architecture.is_allowed(*edge)}
    assert not upwards


def test_the_contract_imports_nothing_of_ours_that_is_above_it() -> None:
    for path in contract():
        assert not [module for module in architecture.imports(path) if architecture.place_of_module(module)], path


def test_there_are_no_circles_between_files() -> None:
    """No file imports, directly or not, a file that imports it."""
    modules = {module_of(path): path for package in PACKAGES for path in architecture.sources(package)}
    uses = {
        module: {
            known for name in architecture.imports(path) if (known := known_module(name, modules)) and known != module
        }
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    waiting, done = set(uses), set[str]()
    while free := {module for module in waiting if not (uses[module] & waiting) - {module}}:
        done |= free
        waiting -= free
    assert not waiting, sorted(waiting)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "pos2d" else ("pos2d", *parts))
    return name.removesuffix(".__init__")


def known_module(name: str, modules: Mapping[str, Path]) -> str | None:
    """The module that an imported name is, or is in; not a package, whose face imports everything."""
    for candidate in (name, name.rpartition(".")[0]):
        if candidate in modules:
            return candidate if modules[candidate].name != "__init__.py" else None
    return None


def test_the_picture_shows_the_imports_of_the_code() -> None:
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.draw(), (
        "run python docs/draw_architecture.py"
    )


def test_the_runtime_comes_without_the_exporter() -> None:
    """``compat``, which may import it, does so only in a merge."""
    program = "import sys, pos2d.compat; sys.exit('pos2d.exporter' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_files_that_travel_import_nothing_of_ours() -> None:
    for path in (ROOT / "pos2d" / "hf").glob("*_pos2d.py"):
        assert {module.split(".")[0] for module in architecture.imports(path)} <= {"torch", "transformers"}


def test_the_contract_is_light() -> None:
    """The standard library and numpy; torch and the rest are for those who use them."""
    for path in contract():
        used = {module.split(".")[0] for module in architecture.imports(path)}
        assert used <= sys.stdlib_module_names | {"numpy", "pos2d", ""}, path


def test_files_and_functions_stay_small() -> None:
    for path in [path for folder in (*PACKAGES, "examples", "benchmarks") for path in architecture.sources(folder)]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize("package", ["exporter", "runtime"])
def test_the_public_names_of_a_package_are_sorted_and_exist(package: str) -> None:
    module = importlib.import_module(f"pos2d.{package}")
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
        return set(signature(function).parameters)

    display_only = {"as_json", "jsonl", "list_presets", "mode"}
    code_only = {"on_event", "on_ready"}
    for name, function in (
        ("merge", exporter.merge),
        ("export", exporter.export),
        ("inspect", exporter.inspect),
        ("plan", exporter.plan),
        ("push", exporter.push),
        ("verify", runtime.verify),
        ("eval", runtime.evaluate),
        ("compare", runtime.compare),
        ("run", runtime.run),
        ("batch", runtime.batch),
        ("serve", runtime.serve),
        ("show-layout", runtime.show_layout),
        ("bench", runtime.bench),
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
