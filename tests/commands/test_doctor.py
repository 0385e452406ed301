"""``doctor``: what the machine has, and its report on packages that are missing, old or broken."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from packaging.requirements import Requirement

from pos2d import runtime
from pos2d.errors import InputError
from pos2d.runtime.doctor import PURPOSES, TOOL

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "safetensors", "psutil", "rich", "regex")


def without(modules: Iterable[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``doctor`` in a process where these modules cannot be imported."""
    program = (
        f"import sys; sys.modules |= dict.fromkeys({list(modules)!r}); "
        f"sys.argv = ['pos2d', 'doctor', *{list(arguments)!r}]; import cli; cli.main()"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def requires(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these the only requirements of the tool."""

    def require(*lines: str, extras: Iterable[str] = ()) -> None:
        given = SimpleNamespace(requires=list(lines), metadata=SimpleNamespace(get_all=lambda _: list(extras)))
        others = metadata.distribution
        monkeypatch.setattr(metadata, "distribution", lambda name: given if name == TOOL else others(name))

    return require


def test_this_machine_has_what_the_suite_needs(call: Call) -> None:
    report = runtime.doctor()
    assert report.faults == []
    report.raise_if_unfit()
    assert report.devices[0].name == "cpu"
    assert "CPUExecutionProvider" in report.providers
    assert "everything that is needed is there" in call("doctor").stdout
    said = json.loads(call("doctor", "--json").stdout)
    assert {package["name"] for package in said["packages"]} >= {"torch", "numpy", "safetensors"}


def test_it_works_without_everything_heavy() -> None:
    done = without(HEAVY)
    assert done.returncode == 3
    for name in HEAVY:
        assert f"\n{name}" in done.stdout
    assert "torch: does not import: import of torch halted" in done.stdout
    assert "accelerate: does not import" not in done.stdout, "it waits for torch, and pip need not make it anew"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "torch (does not import)" in last
    assert "Traceback" not in done.stderr


def test_json_comes_before_the_sentence() -> None:
    done = without(["torch"], "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 3
    assert report["devices"] == []
    assert any("torch>=" in line for line in report["repairs"])


def test_missing_old_and_broken(requires: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    requires(
        "absent-package>=1.5",
        "click>=999",
        "numpy>=1.0",
        "rich>=1.0",
        "other-system>=1; sys_platform == 'none'",
        "absent-tool>=2; extra == 'dev'",
        extras=["dev"],
    )
    report = runtime.doctor()
    faults = {package.name: str(package.fault) for package in report.packages if package.fault}
    assert faults["absent-package"] == faults["absent-tool"] == "missing"
    assert faults["click"].startswith("too old")
    assert faults["numpy"].startswith("does not import")
    assert set(faults) == {"absent-package", "click", "numpy", "absent-tool"}, "another system's packages are no fault"
    assert [package.name for package in report.faults] == ["absent-package", "click", "numpy"]
    assert report.repairs == (
        "pip install 'absent-package>=1.5' 'click>=999'",
        "pip install --force-reinstall --no-deps 'numpy>=1.0'",
    )
    with pytest.raises(InputError, match=r"absent-package \(missing\), click \(too old"):
        report.raise_if_unfit()


def test_what_a_package_waits_for(
    requires: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "waiting.py").write_text("import not_a_module_of_anyone\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda _: "1.0")
    requires("waiting>=1.0")
    report = runtime.doctor()
    assert report.packages[0].fault == "waits for not_a_module_of_anyone"
    assert report.repairs == ("pip install not_a_module_of_anyone",)


def test_an_unknown_package_of_the_tool(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert call("doctor").exit_code == 3


def test_every_requirement_has_a_purpose() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {Requirement(line).name for line in project["dependencies"]} <= set(PURPOSES)
