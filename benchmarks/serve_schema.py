"""Schemathesis against the server's OpenAPI document: 20,000 requests, no status of 5xx but 503, and no hang.

The model is a tiny random one, so that the requests and not the answers take the time. Needs ``make serve-tools``.

    .venv/bin/python benchmarks/serve_schema.py -n 20000
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from serve_report import Check, verdicts
from served import HOST, OFFLINE, ROOT, Served, free_port, ours, served

from pos2d import exporter

SCHEMATHESIS = ROOT / ".venv-serve" / "bin" / "schemathesis"
# Seconds for one answer; generous, since the tool and the server share the cores.
PATIENCE = 20.0
SETTINGS = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""
GENERATED = re.compile(r"(\d[\d,]*) generated")


@click.command()
@click.option("-n", "--requests", type=int, default=20_000, show_default=True, help="At least so many are sent.")
@click.option("--serve-flag", "flags", multiple=True, help="A flag of `serve`, such as --max-request-tokens=8.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first round.")
@click.option("--minutes", type=float, default=30, show_default=True, help="No further round begins after these.")
@click.option(
    "--log", type=click.Path(path_type=Path), default=ROOT / "out" / "serve.log", show_default="out/serve.log"
)
@click.option("--json", "as_json", is_flag=True)
def bench(requests: int, flags: Sequence[str], seed: int, minutes: float, log: Path, as_json: bool) -> None:
    """Send generated requests, in rounds with seeds of their own, until there are enough."""
    if not SCHEMATHESIS.exists():
        raise click.ClickException("run `make serve-tools` first")
    begin = time.monotonic()
    sent, failures = 0, list[str]()
    with tempfile.TemporaryDirectory() as place:
        model, port = tiny_artifact(Path(place)), free_port()
        with served(ours(model, port, flags), port, log) as server:
            operations = count_operations(server)
            while sent < requests and not failures and time.monotonic() < begin + 60 * minutes:
                count, output, status = round_of(Path(place), port, (requests - sent) // operations + 1, seed)
                sent, seed = sent + count, seed + 1
                if status != 0:
                    failures.append(output)
                if not count:
                    failures.append("the round sent no request")
            alive = server.get("/ready")[0] == 200
    checks = [
        Check("requests", sent, at_least=requests),
        Check("rounds with a failure", len(failures), at_most=0),
        Check("ready afterwards", float(alive), at_least=1),
    ]
    if as_json:
        found = {"operations": operations, "failures": failures, "checks": [check.as_dict() for check in checks]}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n".join([*failures, f"{operations} operations", "", *verdicts(checks)]))


def tiny_artifact(place: Path) -> Path:
    """A random model of two layers with a tokenizer of bytes and a chat template, as an ONNX artifact."""
    sys.path.insert(0, str(ROOT))
    from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base, write_tokenizer

    base = write_base(place / "base", CONFIGS["llama"])
    write_tokenizer(base, chat=True)
    lora = write_adapter(place / "lora.pth", random_adapter(square(linear_modules(base))))
    exporter.merge(base, lora, place / "merged", rope_2d_ratio=1.0)
    exporter.export(place / "merged", place / "onnx", no_verify=True)
    return place / "onnx"


def count_operations(server: Served) -> int:
    """Pairs of path and method in the OpenAPI document."""
    status, text = server.get("/openapi.json")
    if status != 200:
        raise click.ClickException(f"/openapi.json answers with status {status}")
    methods = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}
    return sum(method in methods for path in json.loads(text)["paths"].values() for method in path)


def round_of(place: Path, port: int, examples: int, seed: int) -> tuple[int, str, int]:
    """Number of requests, output and exit status of one run of schemathesis.

    One worker: two threads that describe their strategies at once end in an error of Python 3.11's parser.
    """
    (place / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    command = [
        *(str(SCHEMATHESIS), "--config-file", str(place / "schemathesis.toml"), "run"),
        f"http://{HOST}:{port}/openapi.json",
        *("--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--mode", "all"),
        *("--max-examples", str(examples), "--seed", str(seed), "--workers", "1", "--continue-on-failure"),
        *("--request-timeout", str(PATIENCE), "--no-color", "--generation-database", "none"),
        *("--suppress-health-check", "all", "--warnings", "off"),
    ]
    done = subprocess.run(command, cwd=place, env=OFFLINE, capture_output=True, text=True)
    output = done.stdout + done.stderr
    found = GENERATED.search(output)
    return (int(found[1].replace(",", "")) if found else 0), output[-6000:], done.returncode


if __name__ == "__main__":
    bench()
