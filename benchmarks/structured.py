"""Answers that follow JSON schemas: how many of them ended by themselves, parse, and validate.

Every answer is sampled at temperature 1, with random numbers of its own. The schemas have limits, so that answers fit
into the maximum length. Prints one row a schema, with the milliseconds of a step with the schema and without it in the
same run.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click
import jsonschema

from pos2d import runtime
from pos2d.runtime.text.completions import Completion

ROOT = Path(__file__).resolve().parent.parent
TEMPERATURE = 1.0


def _word(length: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": length}


def _record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TAGS = {"type": "array", "items": _word(12), "minItems": 1, "maxItems": 3}
POINT = _record(
    x={"type": "number", "minimum": -90, "maximum": 90, "multipleOf": 0.25},
    y={"type": "integer", "minimum": 0, "maximum": 99},
)
# A question, and the schema of its answer.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nested objects": (
        "Describe a person who lives in a city.",
        _record(
            name=_word(24),
            age={"type": "integer", "minimum": 0, "maximum": 120},
            home=_record(city=_word(24), country={"enum": ["France", "Japan", "Brasil", "Österreich", "中国"]}),
        ),
    ),
    "arrays": (
        "Name places on a map.",
        _record(points={"type": "array", "items": POINT, "minItems": 2, "maxItems": 4}),
    ),
    "choices": (
        "What is the weather like?",
        _record(sky={"enum": ["clear", "cloudy", "rain", "snow ☃"]}, windy={"type": "boolean"}, tags=TAGS),
    ),
    "one of several": (
        "Give a result, or the reason why there is none.",
        {
            "anyOf": [
                _record(result={"type": ["integer", "null"], "minimum": -1000, "maximum": 1000}, tags=TAGS),
                _record(error=_record(code={"enum": [400, 404, 500]}, message=_word(40))),
            ]
        },
    ),
    "texts of a form": (
        "When and where do we meet?",
        _record(
            day={"type": "string", "format": "date"},
            room={"type": "string", "pattern": "^[A-F][0-9]{1,3}$"},
            note={"type": "string", "maxLength": 60},
        ),
    ),
}


@dataclass(slots=True)
class Row:
    schema: str
    answers: int = 0
    whole: int = 0
    valid: int = 0
    tokens: int = 0
    seconds: float = 0.0
    free_tokens: int = 0
    free_seconds: float = 0.0


@click.command()
@click.option("--model", default=str(ROOT / "demo" / "int8"), show_default="demo/int8")
@click.option("-a", "--answers", type=int, default=200, show_default=True, help="Of all schemas together.")
@click.option("-n", "--max-new-tokens", type=int, default=256, show_default=True)
@click.option("-b", "--branches", type=int, default=8, show_default=True, help="Answers that are written side by side.")
@click.option("--json", "as_json", is_flag=True)
def bench(model: str, answers: int, max_new_tokens: int, branches: int, as_json: bool) -> None:
    """Count the answers; the exit code is 1 if one ended by itself and is not valid, or if one did not end."""
    loaded = runtime.load(model)
    rows = [Row(name) for name in CASES]
    seeds = count()
    while (left := answers - sum(row.answers for row in rows)) > 0:
        row = min(rows, key=lambda row: row.answers)
        _answer(loaded, row, min(branches, left), next(seeds), max_new_tokens)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _show(rows)
    if any(row.valid < row.answers for row in rows):
        raise SystemExit(1)


def _answer(model: runtime.Model, row: Row, branches: int, seed: int, limit: int) -> None:
    """Add the answers of one request to ``row``, and the time of the same request without its schema."""
    question, schema = CASES[row.schema]
    options: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "seed": seed,
        "max_new_tokens": limit,
        "visibility": "isolated",
    }
    started = time.perf_counter()
    found = model.generate([question] * branches, json_schema=schema, **options)
    row.seconds += time.perf_counter() - started
    row.answers += branches
    row.whole += sum(answer.finish_reason == "stop" for answer in found)
    row.valid += sum(_is_valid(answer, schema) for answer in found)
    steps = max(len(answer.token_ids) for answer in found)
    row.tokens += steps
    started = time.perf_counter()
    model.generate([question] * branches, **{**options, "max_new_tokens": steps, "min_new_tokens": steps})
    row.free_seconds += time.perf_counter() - started
    row.free_tokens += steps


def _is_valid(answer: Completion, schema: dict[str, Any]) -> bool:
    """Whether the answer parses and validates."""
    try:
        jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        click.echo(f"{answer.finish_reason}: {answer.text!r}: {str(error).splitlines()[0]}", err=True)
        return False
    return True


def _show(rows: list[Row]) -> None:
    click.echo(f"{'schema':18} {'answers':>8} {'whole':>6} {'valid':>6} {'ms/step':>8} {'without':>8}")
    for row in rows:
        click.echo(
            f"{row.schema:18} {row.answers:8} {row.whole:6} {row.valid:6} "
            f"{1000 * row.seconds / row.tokens:8.1f} {1000 * row.free_seconds / row.free_tokens:8.1f}"
        )
    ratio = statistics.median(row.seconds / row.tokens / (row.free_seconds / row.free_tokens) for row in rows)
    valid, answers = sum(row.valid for row in rows), sum(row.answers for row in rows)
    click.echo(f"{valid} of {answers} answers are valid; a step takes {ratio:.2f} times as long as without a schema")


if __name__ == "__main__":
    bench()
