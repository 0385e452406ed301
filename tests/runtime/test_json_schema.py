"""Answers that follow a JSON schema: whatever the logits are, one that ended by itself parses and validates."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import Result

from pos2d import runtime
from pos2d.errors import InputError, UsageError
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.runtime.engine.generation_settings import GenerationSettings
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.text import json_schema
from pos2d.runtime.text.json_schema import JsonSchemas
from pos2d.runtime.text.text_decode import TextSampler
from tests.bases import write_tokenizer

Schema = dict[str, Any]
POINT: Schema = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -20, "maximum": 300}, "y": {"type": "boolean"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
WORD: Schema = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, Schema] = {
    "an object in an object": {
        "type": "object",
        "properties": {"at": POINT, "name": WORD, "note": {"type": ["string", "null"], "maxLength": 3}},
        "required": ["at", "name"],
        "additionalProperties": False,
    },
    "arrays": {
        "type": "array",
        "items": {"type": "array", "items": POINT, "maxItems": 2},
        "minItems": 2,
        "maxItems": 4,
    },
    "choices": {"enum": ["é", "日本語", 'a"b\\c\n', 3, None, {"k": [1, "two"]}]},
    "a constant": {
        "type": "object",
        "properties": {"k": {"const": "ж\u0001"}},
        "required": ["k"],
        "additionalProperties": False,
    },
    "one of several": {"anyOf": [POINT, {"type": "array", "items": WORD, "maxItems": 2}, {"type": "null"}]},
    "a pattern": {"type": "string", "pattern": "^[a-f]{2,5}-[0-9]+$", "maxLength": 12},
    "a format": {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 2},
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "parts together": {"allOf": [POINT, {"properties": {"x": {"minimum": 5}}}]},
    "keys of any name": {
        "type": "object",
        "patternProperties": {"^k[a-c]$": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
    "a number": {"type": "number", "multipleOf": 0.5, "minimum": -4, "maximum": 4},
    "any object": {"type": "object", "maxProperties": 3},
}
LIMIT = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes, and a special token after them."""
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer(directory, special=["<end>"])
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def schemas(tokenizer: Any) -> JsonSchemas:
    return JsonSchemas(tokenizer)


def write(
    tokenizer: Any, schemas: JsonSchemas, rows: Callable[[], Any], ends: Sequence[int] = (), **options: Any
) -> tuple[str, bool]:
    """An answer over ``rows`` of logits, and whether it ended by itself."""
    sampling = Sampling(**{"temperature": 1.0, **options})
    constraint = schemas.constraint(options["json_schema"], ends)
    sampler = TextSampler(tokenizer, sampling, (0,), ends, [1, 2], constraint)
    for _ in range(LIMIT):
        token = sampler.choose(rows()).token
        if token in ends or sampler.append(token):
            return sampler.take_text(last=True), True
    return sampler.take_text(last=True), False


def drawn(seed: int, size: int = 256) -> Callable[[], Any]:
    draw = np.random.default_rng(seed)
    return lambda: draw.normal(scale=3, size=size).astype(np.float32)


def check(text: str, schema: Schema) -> None:
    """``text`` is one JSON value that fits, without white space between its parts."""
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert not re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text))
    text.encode()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_that_ended_parses_and_validates(tokenizer: Any, schemas: JsonSchemas, name: str) -> None:
    """Over random logits, the worst of models; with an end token, which is taken only where the value is whole."""
    schema, whole = SCHEMAS[name], 0
    for seed in range(12):
        ends = [4] if seed % 3 else []  # "%" stands for an end token in this vocabulary
        options: dict[str, Any] = [{}, {"temperature": 0.0}, {"top_k": 2, "repetition_penalty": 1.5}][seed % 3]
        text, ended = write(tokenizer, schemas, drawn(seed), ends, json_schema=schema, seed=seed, **options)
        if ended:
            check(text, schema)
            whole += 1
    assert whole >= (3 if name == "any object" else 12)


def test_end_tokens_do_not_end_an_unfinished_value(tokenizer: Any, schemas: JsonSchemas) -> None:
    """A bias that makes one the likeliest everywhere ends a number after its first digits, and an object nowhere."""
    bias: dict[str, Any] = {"logit_bias": {"4": 100}}
    for seed in range(5):
        text, _ = write(tokenizer, schemas, drawn(seed), [4], json_schema=POINT, **bias)
        check(text, POINT)
        number, ended = write(tokenizer, schemas, drawn(seed), [4], json_schema={"type": "integer"}, **bias)
        assert ended
        assert re.fullmatch(r"-?\d", number)


def test_a_schema_holds_against_options_that_forbid_all_that_it_allows(tokenizer: Any, schemas: JsonSchemas) -> None:
    settings = GenerationSettings(no_repeat_ngram_size=1, suppress_tokens=tuple(range(90)), forced_bos_token_id=7)
    for seed in range(5):
        options: dict[str, Any] = {"generation": settings, "min_new_tokens": 250, "seed": seed}
        text, ended = write(tokenizer, schemas, drawn(seed), [4], json_schema=POINT, **options)
        assert ended
        check(text, POINT)


@pytest.mark.parametrize("size", [200, 257, 999])
def test_a_model_may_have_more_or_fewer_tokens_than_the_tokenizer(
    tokenizer: Any, schemas: JsonSchemas, size: int
) -> None:
    for seed in range(5):
        text, ended = write(tokenizer, schemas, drawn(seed, size), json_schema=POINT, seed=seed)
        assert ended
        check(text, POINT)
    # No digit is among the first tokens of this vocabulary.
    with pytest.raises(InputError, match="no continuation in tokens of this model"):
        write(tokenizer, schemas, drawn(0, 14), json_schema={"type": "integer"})


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "obj"}, "cannot be enforced: Invalid type: obj"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ."uniqueItems".'),
        ({"properties": {"a": {"not": {}}}}, 'Unimplemented keys: ."not".'),
        ({"oneOf": [WORD, {"type": "string", "minLength": 2}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "nonsense"}, "Unknown format: nonsense"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable"),
        ({"$ref": "http://example.com/schema"}, "does not fetch"),
        ({"$ref": "#"}, "no JSON fits it"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "a schema must allow an answer"),
        ({"enum": []}, "Unsatisfiable"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance', which pos2d sets itself"),
        ({"const": float("nan")}, "is no JSON"),
        ({"const": "\ud800"}, "is no JSON"),
        ({"const": {1, 2}}, "is no JSON"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": WORD}} for j in range(4)]} for i in range(8)]},
            "schema too large",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_enforced_is_refused_by_name(schemas: JsonSchemas, schema: Schema, words: str) -> None:
    with pytest.raises(UsageError, match=f"`json_schema`.*{words}") as raised:
        schemas.check(schema)
    assert len(str(raised.value).splitlines()) == 1


def test_a_schema_is_refused_before_anything_is_decoded(talker: runtime.Model) -> None:
    for refuse in (
        lambda: talker.stream("one", json_schema={"type": "obj"}),
        lambda: talker.conversation(json_schema={"type": "obj"}),
    ):
        with pytest.raises(UsageError, match="`json_schema` cannot be enforced: Invalid type: obj"):
            refuse()


def test_a_schema_that_takes_long_to_compile_is_refused(schemas: JsonSchemas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some patterns take minutes, which would keep a thread busy that nobody can stop."""
    monkeypatch.setattr(json_schema, "MAX_SECONDS", 1)
    patterns = [{"type": "string", "pattern": f"(.*a.{{{count}}}b.*)"} for count in range(30)]
    multiples = [{"type": "integer", "multipleOf": number} for number in (97, 101, 103)]
    for parts in (patterns, multiples):
        with pytest.raises(UsageError, match="`json_schema` takes more than 1 s or 2 GiB to compile; simplify its"):
            schemas.check({"allOf": parts})


def test_a_schema_is_of_texts_and_needs_the_library(
    talker: runtime.Model, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"`json_schema` is about texts; use stream\(\)"):
        list(talker.stream_ids([[1]], json_schema=POINT))
    with pytest.raises(UsageError, match="`json_schema` goes with an `end_token` that is a special token"):
        talker.generate("one", json_schema=POINT, end_token="}")
    with pytest.raises(UsageError, match="`json_schema` 5 must be a JSON object"):
        talker.generate("one", json_schema=5)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"needs the package llguidance.*pip install 'pos2d\[serve\]'"):
        JsonSchemas(tokenizer).check(POINT)


def test_a_schema_is_compiled_once_and_old_ones_are_dropped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = json_schema._compiled

    def counted(text: str, vocabulary: Any) -> Any:
        compiled.append(text)
        return compile_one(text, vocabulary)

    monkeypatch.setattr(json_schema, "_compiled", counted)
    monkeypatch.setattr(json_schema, "KEPT_SCHEMAS", 2)
    schemas = JsonSchemas(tokenizer)
    one, two, three = ({"const": number} for number in (1, 2, 3))
    for schema in (one, one, two, one, three, one, two):
        schemas.constraint(schema, ())
    assert compiled == [json.dumps(schema) for schema in (one, two, three, two)]
    # The order of its keys is that of the answer's.
    for order in (["a", "b"], ["b", "a"]):
        properties = {key: {"const": 1} for key in order}
        ordered = POINT | {"properties": properties, "required": ["a", "b"]}
        text, _ = write(tokenizer, schemas, drawn(1), json_schema=ordered)
        assert list(json.loads(text)) == order


def test_branches_follow_schemas_of_their_own(talker: runtime.Model, tmp_path: Path) -> None:
    """Several prompts of one request, and lines of a batch that share a sequence."""
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 200}
    answers = talker.generate(["one", "two", "three"], "said before. ", json_schema=POINT, seed=2, **options)
    for answer in answers:
        assert answer.finish_reason == "stop"
        check(answer.text, POINT)
    assert len({answer.text for answer in answers}) > 1
    names = ["arrays", "choices", "a format", "references"]
    lines: list[dict[str, Any]] = [{"prompt": "one", "json_schema": SCHEMAS[name]} for name in names]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    runtime.batch(talker.path, tmp_path / "in.jsonl", tmp_path / "out.jsonl", **options)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, record in zip(lines, records, strict=True):
        (completion,) = record["completions"]
        (alone,) = talker.generate("one", json_schema=line["json_schema"], **options)
        assert (completion["finish_reason"], completion["text"]) == ("stop", alone.text)
        check(completion["text"], line["json_schema"])


def test_limits_and_stop_texts_end_an_answer_where_they_do(talker: runtime.Model) -> None:
    """Its text may be incomplete then; a whole value at the limit has ended by itself."""
    (whole,) = talker.generate("one", json_schema=POINT, max_new_tokens=60)
    count = len(whole.token_ids)
    (cut,) = talker.generate("one", json_schema=POINT, max_new_tokens=count - 1)
    assert (cut.finish_reason, cut.text) == ("length", whole.text[:-1])
    (exact,) = talker.generate("one", json_schema=POINT, max_new_tokens=count)
    assert exact == whole
    assert whole.finish_reason == "stop"
    (stopped,) = talker.generate("one", json_schema=POINT, max_new_tokens=60, stop='"y"')
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text[: whole.text.index('"y"')])
    endless = replace(talker, manifest=replace(talker.manifest, eos_token_ids=()))
    (without_end_tokens,) = endless.generate("one", json_schema=POINT, max_new_tokens=60)
    check(without_end_tokens.text, POINT)


def test_the_command_line_reads_a_schema_from_a_file(
    call: Callable[..., Result], talking: Path, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(POINT), encoding="utf-8")
    flags = ["-p", "one", "-n", "60", "--json", "--json-schema"]
    done = call("run", talking / "onnx", *flags, f"@{tmp_path / 'schema.json'}")
    report = json.loads(done.stdout)
    check(report["completions"][0]["text"], POINT)
    assert report["sampling"]["json_schema"] == POINT
    assert report["settings"] == "greedy, json_schema"
    refused = call("run", talking / "onnx", *flags, '{"type": "obj"}')
    assert (refused.exit_code, "--json-schema cannot be enforced: Invalid type: obj" in refused.stderr) == (2, True)
    absent = call("run", talking / "onnx", *flags, f"@{tmp_path / 'nowhere.json'}")
    assert (absent.exit_code, "nowhere.json cannot be read" in absent.stderr) == (3, True)
