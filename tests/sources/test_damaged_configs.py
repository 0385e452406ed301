"""Whatever stands in a configuration, reading it ends well or with one sentence and the exit code of bad input."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pos2d import exporter
from pos2d.commands.shared.inspect_text import inspect_text
from pos2d.errors import InputError, Pos2DError
from pos2d.exporter.inspection.model_facts import base_facts
from pos2d.exporter.merging.journal import Journal
from pos2d.exporter.merging.ledger import read_ledger
from pos2d.manifest import read_manifest
from pos2d.sources.adapters.peft import read_peft
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.files.json_object import write_json
from pos2d.sources.hf_config import baked_config, model_config
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.sidecars.sidecars import write_sidecars
from pos2d.sources.source import from_adapters
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer
from tests.peft_files import RANK, write_peft

# Fixed examples, the same in every run.
FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD_NUMBERS = st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 10**400, 0.0, -0.5, 1.5, 1e308, float("nan"), float("inf")])
ODD_TEXTS = st.sampled_from(["", "2", "true", "../x", "x\ny", "\ud800", "yarn", "é" * 500])
SCALARS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXTS)
KEYS = st.sampled_from(["a", "rope_type", "factor", "rope_theta", "type", "quant_method", "model_type"])
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3))
# Keys that the documents below need not have.
FURTHER_KEYS = (
    *("rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "layer_types", "quantization_config"),
    *("text_config", "eos_token_id", "pad_token_id", "partial_rotary_factor", "transformers_weights", "id2label"),
    *("mlp_bias", "original_max_position_embeddings", "attention_dropout", "weight_map", "tokenizer_class"),
)


def places(document: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    parts = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in parts:
        yield (*before, key)
        yield from places(value, (*before, key))


@st.composite
def damaged(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """The document with one or two values replaced, taken out or added."""
    content = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        paths = [*places(content), *((key,) for key in FURTHER_KEYS)]
        *path, last = draw(st.sampled_from(paths))
        owner = content
        for key in path:
            owner = owner[key]
        value = draw(VALUES)
        if draw(st.integers(0, 7)) or isinstance(owner, list) or last not in owner:
            owner[last] = value
        else:
            del owner[last]
    return content


def ends_well(work: Callable[[], object]) -> None:
    refused: Pos2DError | None = None
    try:
        work()
    except Pos2DError as error:
        refused = error
    if refused is not None:
        assert refused.exit_code in (3, 4, 6), repr(refused)
        assert len(str(refused).splitlines()) == 1
        assert len(str(refused)) < 1000


def fuzz(path: Path, work: Callable[[], object]) -> None:
    """Do ``work`` with many damaged contents of the JSON file ``path``, which is then as it was."""
    original = path.read_bytes()

    @FUZZ
    @given(damaged(json.loads(original)))
    def with_one(content: dict[str, Any]) -> None:
        path.write_text(json.dumps(content), encoding="utf-8")
        ends_well(work)

    try:
        work()
        with_one()
    finally:
        path.write_bytes(original)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    names = ("llama with yarn rope", "mistral with wide heads", "qwen2 with linear rope", "qwen3 with wide heads")
    made = {name: write_base(place / name, CONFIGS[name]) for name in names}
    for base in made.values():
        write_tokenizer(base, chat=True)
        write_json(base / "generation_config.json", {"eos_token_id": [2, 3], "temperature": 0.5})
        write_adapter(base.with_suffix(".pth"), random_adapter(linear_modules(base)))
    return made


def small_files(base: Path, target: Path) -> None:
    """Read a base with its adapter, and write what a merge writes beside weights."""
    source = from_adapters(base, base.with_suffix(".pth"), TrainedPositions(no_patch_rope=True))
    base_facts(source.base)
    write_json(target / "config.json", baked_config(source.base, source.spec, "float32", source.base.sizes.tied))
    model_config(source.base, source.spec, source.base.sizes.tied)
    write_sidecars(source.sidecars, target, source.base.sizes.family)


@pytest.mark.parametrize("family", ["llama with yarn rope", "mistral with wide heads", "qwen3 with wide heads"])
def test_configurations_of_bases(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    fuzz(bases[family] / "config.json", lambda: small_files(bases[family], tmp_path))


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_settings_beside_a_base(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    base = bases["qwen2 with linear rope"]
    fuzz(base / name, lambda: small_files(base, tmp_path))


def test_indices_of_weights(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"], max_shard_size="60KB")
    fuzz(base / "model.safetensors.index.json", lambda: read_base(base))


@pytest.mark.parametrize("kind", ["merged", "onnx"])
def test_manifests(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base = bases["llama with yarn rope"]
    artifact = tmp_path / kind
    exporter.merge(base, base.with_suffix(".pth"), tmp_path / "merged", no_patch_rope=True)
    if kind == "onnx":
        exporter.export(tmp_path / "merged", artifact, quant="int8", no_verify=True, no_calibration=True)

    def describe() -> None:
        inspect_text(exporter.inspect(artifact))
        exporter.plan(artifact)
        read_ledger(read_manifest(artifact))

    fuzz(artifact / "manifest.json", describe)


def test_a_manifest_that_names_other_graphs(bases: dict[str, Path], tmp_path: Path) -> None:
    base, path = bases["llama with yarn rope"], tmp_path / "onnx" / "manifest.json"
    options: dict[str, Any] = {"quant": "int8", "no_verify": True, "no_calibration": True, "no_patch_rope": True}
    exporter.export(None, path.parent, base_model=base, lora=base.with_suffix(".pth"), **options)
    text = path.read_text(encoding="utf-8")
    for name in ("model_batch.onnx", "model.onnx.data"):
        block = json.loads(text)
        block["graph"] = json.loads(json.dumps(block["graph"]).replace(f'"{name}"', '"other"'))
        write_json(path, block)
        with pytest.raises(InputError, match="graph names other, which files lacks"):
            read_manifest(path.parent)


def test_configurations_of_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter", alpha_pattern={"q_proj": 3}, rank_pattern={"q_proj": RANK})
    base = read_base(bases["mistral with wide heads"])
    ends_well(lambda: read_peft(adapter, base))

    def read_both() -> None:
        ends_well(lambda: read_peft(adapter, base))
        ends_well(lambda: exporter.inspect(adapter))

    fuzz(adapter / "adapter_config.json", read_both)


def test_journals(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json", {"options": {"seed": 0}})
    journal.write({})
    fuzz(journal.path, journal.read)


ODD_FILES: dict[str, bytes] = {
    "not UTF-8": b'{"model_type": "\xff"}',
    "nested too deep": b'{"a": ' * 3000 + b"1" + b"}" * 3000,
    "nested deeper than can be written": b'{"model_type": "llama", "a": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a number without end": b'{"vocab_size": ' + b"9" * 9000 + b"}",
    "half a character": b'{"model_type": "llama", "a": {"b": ["\\udc00"]}}',
    "a list": b"[1]",
    "cut": b'{"model_type": "lla',
    "empty": b"",
}


@pytest.mark.parametrize("content", ODD_FILES.values(), ids=ODD_FILES)
def test_files_that_are_no_objects(bases: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json.*; copy the model again") as caught:
        read_base(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_byte_order_mark_and_a_key_that_is_there_twice(bases: dict[str, Path], tmp_path: Path) -> None:
    """The last one counts, as in every JSON reader of Python."""
    base = bases["mistral with wide heads"]
    original = (base / "config.json").read_bytes()
    try:
        (base / "config.json").write_bytes(b"\xef\xbb\xbf" + original.replace(b"{", b'{"vocab_size": 7, ', 1))
        assert read_base(base).sizes.vocab == 300
    finally:
        (base / "config.json").write_bytes(original)
