"""The files in deploy/ name what the server has: its metrics, its flags and its files."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
REQUIRED = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
    *("generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
)


def unit() -> dict[str, list[str]]:
    """Directives of the systemd unit; one that is repeated has several values."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "pos2d.service").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "[")):
            name, separator, value = line.partition("=")
            assert separator, line
            assert re.fullmatch(r"[A-Z][A-Za-z]+", name), line
            found.setdefault(name, []).append(value)
    return found


def commands() -> dict[str, list[str]]:
    """The words of every command that starts the server."""
    found = {"pos2d.service": shlex.split(unit()["ExecStart"][0])}
    for name in ("Dockerfile", "Dockerfile.cuda"):
        lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
        found[name] = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).partition(" ")[2])
    return found


def queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_query_of_the_dashboard_names_a_metric_of_the_server() -> None:
    metrics = pytest.importorskip("pos2d.runtime.http.metrics")
    from pos2d.runtime.serving.jobs import EngineLoad

    text = metrics.Metrics().text(EngineLoad(0, 0, 0, 0, 1))[0].decode()
    exposed: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE):
        exposed |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    for query in queries():
        names = re.findall(r"pos2d:\w+", query)
        assert names, query
        assert set(names) <= exposed, query


def test_the_dashboard_shows_every_metric_that_operators_need() -> None:
    shown = {name.removesuffix("_bucket") for query in queries() for name in re.findall(r"pos2d:(\w+)", query)}
    assert shown == set(REQUIRED)
    assert all("by (le)" in query for query in queries() if "_bucket" in query)


def test_panels_have_their_own_numbers_and_places() -> None:
    panels: list[dict[str, Any]] = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


def test_commands_use_flags_that_serve_has() -> None:
    options = pytest.importorskip("pos2d.runtime.http.options").ServeOptions
    known = {f"--{field.name.replace('_', '-')}" for field in fields(options)}
    for name, words in commands().items():
        assert words[1] == "serve", name
        assert {word for word in words if word.startswith("--")} <= known, name


def test_the_unit_waits_longer_than_the_server_needs_to_end() -> None:
    directives, words = unit(), commands()["pos2d.service"]
    assert float(directives["TimeoutStopSec"][0]) > float(words[words.index("--grace") + 1])
    assert words[words.index("--host") + 1] == "127.0.0.1"
    only_once = {name for name, values in directives.items() if len(values) > 1}
    assert only_once <= {"Environment", "SystemCallFilter"}


def test_an_image_gets_all_packages_and_nothing_else_of_the_checkout() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    folders = re.search(r"FOLDERS = \((.*?)\)", setup)
    assert folders is not None
    files = {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE"}
    assert kept == {"pos2d", *re.findall(r'"(\w+)"', folders[1]), *files}
    assert all((ROOT / name).exists() for name in kept)
