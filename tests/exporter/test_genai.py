"""The graph for onnxruntime-genai, through ONNX Runtime alone, and through onnxruntime-genai where it is installed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from pos2d import exporter, runtime
from pos2d.errors import InputError, UsageError
from pos2d.exporter.formats.genai.limits import genai_warnings
from pos2d.exporter.formats.onnx import decoder
from pos2d.manifest import read_manifest
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.source import from_adapters
from tests.bases import CONFIGS, SHAPE, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer
from tests.bounds import logits_bound

# GroupQueryAttention needs heads of a multiple of 8.
WIDE = SHAPE | {"head_dim": 16}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**(SHAPE | {"hidden_size": 64})),
    "qwen3": Qwen3Config(**WIDE),
    "mistral": MistralConfig(**WIDE, sliding_window=None),
}
# The fastest frequencies turn with the branch: in one branch they stand still, which changes every logit.
PAIRS = [1, 5, 2, 6, 3]
LENGTHS = (23, 14)
ENDS = (2, 7)
PROMPT = "What a day"


@dataclass(frozen=True, slots=True)
class Pair:
    """The same weights for onnxruntime-genai and as a merged directory, and two prompts."""

    genai: Path
    merged: Path
    prompts: tuple[list[int], ...]

    def expected(self, prompt: list[int]) -> np.ndarray:
        """Logits ``[S, V]`` of one branch."""
        logits: np.ndarray = runtime.load(self.merged, device="cpu", dtype="float32").logits(np.array([prompt]))[0]
        return logits


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp(request.param)
    base = write_base(place / "base", FAMILIES[request.param])
    write_tokenizer(base, chat=True)
    settings = {
        "eos_token_id": list(ENDS),
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "pad_token_id": 0,
        "min_p": 0.1,
    }
    (base / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    lora = write_adapter(place / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(base, lora, place / "merged", pair_indices=PAIRS)
    exporter.export(place / "merged", place / "genai", format="genai", no_verify=True)
    draw = np.random.default_rng(3)
    return Pair(place / "genai", place / "merged", tuple(draw.integers(8, 300, count).tolist() for count in LENGTHS))


class Driver:
    """Feeds a graph as onnxruntime-genai does, by the names that the configuration has."""

    def __init__(self, directory: Path) -> None:
        self.model = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = self.model["decoder"]
        self.inputs, self.outputs = decoder["inputs"], decoder["outputs"]
        self.session = ort.InferenceSession(directory / decoder["filename"], providers=["CPUExecutionProvider"])
        self.layers = range(decoder["num_hidden_layers"])
        self.shape = (decoder["num_key_value_heads"], decoder["head_size"])
        self.past: dict[str, np.ndarray] = {}

    def names(self, side: dict[str, str], when: str) -> list[str]:
        return [side[f"{when}_{part}_names"] % layer for layer in self.layers for part in ("key", "value")]

    def __call__(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits ``[B, S, V]`` after what was fed before."""
        heads, width = self.shape
        past_names = self.names(self.inputs, "past")
        past = self.past or {name: np.zeros((len(ids), heads, 0, width), np.float32) for name in past_names}
        named = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        feeds = {self.inputs[name]: array for name, array in named.items()} | past
        wanted = [self.outputs["logits"], *self.names(self.outputs, "present")]
        logits, *present = self.session.run(wanted, feeds)
        self.past = dict(zip(past_names, present, strict=True))
        assert isinstance(logits, np.ndarray)
        return logits


def test_one_branch_has_the_logits_of_the_merged_model(pair: Pair) -> None:
    driver, prompt = Driver(pair.genai), np.array([pair.prompts[0]])
    pieces = []
    for start, stop in ((0, 9), (9, 10), (10, len(pair.prompts[0]))):
        positions = np.arange(start, stop)[None]
        pieces.append(driver(prompt[:, start:stop], positions, np.ones((1, stop), np.int64))[0])
    expected = pair.expected(pair.prompts[0])
    np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=0, atol=logits_bound(expected))


def test_rows_of_a_batch_are_padded_after_their_tokens(pair: Pair) -> None:
    """Then every row writes its next token, at the next position."""
    driver, longest = Driver(pair.genai), max(LENGTHS)
    ids, positions, mask = (np.zeros((2, longest), np.int64) for _ in range(3))
    for row, prompt in enumerate(pair.prompts):
        ids[row, : len(prompt)], positions[row, : len(prompt)] = prompt, np.arange(len(prompt))
        mask[row, : len(prompt)] = 1
    first = driver(ids, positions, mask)
    new = np.array([[9], [11]])
    second = driver(new, np.array(LENGTHS)[:, None], np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1))
    for row, prompt in enumerate(pair.prompts):
        expected = pair.expected([*prompt, int(new[row, 0])])
        found = np.concatenate([first[row, : len(prompt)], second[row]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=logits_bound(expected))


def test_configuration_and_manifest_say_what_the_model_is(pair: Pair) -> None:
    config = json.loads((pair.genai / "genai_config.json").read_text(encoding="utf-8"))
    manifest, trained = read_manifest(pair.genai), read_manifest(pair.merged)
    assert (manifest.kind, manifest.rope_2d.is_2d, manifest.one_branch_of) == ("genai", False, trained.rope_2d)
    assert manifest.files["genai_config.json"]["sha256"]
    model, search = config["model"], config["search"]
    found = {name: model[name] for name in ("type", "eos_token_id", "pad_token_id", "vocab_size", "context_length")}
    assert found == {
        "type": manifest.family,
        "eos_token_id": list(ENDS),
        "pad_token_id": 0,
        "vocab_size": 300,
        "context_length": 512,
    }
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.5, 7, 1.0)
    assert search["max_length"] == 512
    driver = Driver(pair.genai)
    listed = [*(driver.inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))]
    assert {*listed, *driver.names(driver.inputs, "past")} == {i.name for i in driver.session.get_inputs()}
    assert {"logits", *driver.names(driver.outputs, "present")} == {o.name for o in driver.session.get_outputs()}


def test_the_runtime_answers_prompts_one_by_one(pair: Pair) -> None:
    model, merged = runtime.load(pair.genai), runtime.load(pair.merged, device="cpu", dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    texts = [PROMPT, "And then"]
    assert answers(model, texts[:1], **options) == answers(merged, texts[:1], **options)
    expected = answers(merged, texts, max_branches=1, **options)
    assert answers(model, texts, **options) == expected
    for asked in (
        lambda: answers(model, texts, visibility="columnar", **options),
        lambda: model.generate_ids(pair.prompts),
    ):
        with pytest.raises(UsageError, match="for onnxruntime-genai and has one branch; ask for one answer at a time"):
            asked()


def answers(model: runtime.Model, texts: list[str], **options: Any) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in model.generate(texts, **options)]


def test_verify_tells_a_graph_whose_branch_frequencies_turn(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = runtime.verify(pair.genai, pair.merged)
    assert report.passed
    assert [case.name for case in report.cases] == ["one branch, cached", "one branch, one pass"]
    monkeypatch.setattr(decoder, "BRANCH", -1)
    exporter.export(pair.merged, tmp_path / "genai", format="genai", no_verify=True)
    assert not runtime.verify(tmp_path / "genai", pair.merged).passed


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_the_export_compares_a_float_graph_with_its_source(pair: Pair, tmp_path: Path) -> None:
    report = exporter.export(pair.merged, tmp_path / "genai", format="genai")
    assert report.parity is not None
    assert report.parity["passed"]
    assert "logits within" in report.summary()
    assert [warning for warning in report.warnings if "no setting for min_p" in warning]


@pytest.mark.parametrize("pair", ["qwen2"], indirect=True)
def test_quantised_weights_are_those_of_our_own_graphs(pair: Pair, tmp_path: Path) -> None:
    """Calibrated, and checked against the exact model."""
    report = exporter.export(pair.merged, tmp_path / "genai", format="genai", quant="int8")
    exporter.export(pair.merged, tmp_path / "onnx", format="onnx", quant="int8", no_verify=True)
    weights = [(tmp_path / kind / "model.onnx.data").read_bytes() for kind in ("genai", "onnx")]
    assert weights[0] == weights[1]
    assert report.parity is not None
    assert [case["name"] for case in report.parity["exact"]["cases"]] == ["one branch"]
    manifests = [read_manifest(tmp_path / kind) for kind in ("genai", "onnx")]
    assert manifests[0].graph_quant == manifests[1].graph_quant
    prompt = np.array([pair.prompts[0]])
    ours, theirs = (runtime.load(tmp_path / kind).logits(prompt) for kind in ("onnx", "genai"))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=logits_bound(ours))
    assert runtime.verify(tmp_path / "genai").passed


def test_what_it_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    narrow = write_base(tmp_path / "narrow", CONFIGS["llama"])
    with pytest.raises(InputError, match="head_dim 12 is not a multiple of 8"):
        exporter.export(narrow, tmp_path / "out", format="genai")
    base = write_base(tmp_path / "base", LlamaConfig(**(WIDE | {"eos_token_id": None})))
    with pytest.raises(InputError, match=r"names no end token.*add `eos_token_id`"):
        exporter.export(base, tmp_path / "out", format="genai")
    settings = base / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": 2, "top_k": "many"}), encoding="utf-8")
    with pytest.raises(InputError, match="top_k 'many' must be a whole number"):
        exporter.export(base, tmp_path / "out", format="genai")
    with pytest.raises(UsageError, match="`quant='nf4'` needs `format='bnb'`; `format='genai'` takes `quant`"):
        exporter.export(base, tmp_path / "out", format="genai", quant="nf4")
    assert not (tmp_path / "out").exists()


def test_onnxruntime_genai_answers_as_the_merged_model(pair: Pair) -> None:
    """Greedy tokens and their logits, the ids of a conversation of three turns, and each of the end tokens."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(pair.genai))
    prompt = pair.prompts[0]
    logits, tokens = greedy(genai, model, prompt, 40)
    # The row of a token that is followed by an end token is still compared.
    expected = pair.expected([*prompt, *tokens])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=logits_bound(expected))
    for end in ENDS:
        assert greedy(genai, model, [*prompt[:3], end], 1)[0].shape == (1, 300)  # an end token in a prompt ends nothing
    conversation = [
        {"role": role, "content": text}
        for role, text in zip(
            ("user", "assistant") * 3, ("Hi!", "Hello, you.", "Caf\u00e9?", "Yes.\n", "Go on"), strict=False
        )
    ]
    ours = runtime.load(pair.merged).tokenizer
    tokenizer = genai.Tokenizer(model)
    text = tokenizer.apply_chat_template(json.dumps(conversation), add_generation_prompt=True)
    expected_ids = ours.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(text).tolist() == expected_ids


def greedy(genai: Any, model: Any, prompt: list[int], count: int) -> tuple[np.ndarray, list[int]]:
    """Logits ``[S, V]`` and tokens of an answer of at most ``count`` tokens."""
    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + count)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    rows, tokens = [], []
    while not generator.is_done():
        rows.append(generator.get_logits().reshape(-1).copy())
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return np.array(rows), tokens


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        ({"type": "BPE", "byte_fallback": True}, "makes other tokens of several spaces in a row"),
        ({"type": "Unigram"}, "cannot read a Unigram tokenizer"),
        ({"type": "BPE", "byte_fallback": False}, None),
    ],
)
def test_where_onnxruntime_genai_departs_from_the_files_the_export_warns(
    model: dict[str, Any], warned: str | None, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", FAMILIES["llama"])
    (base / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    (base / "generation_config.json").write_text('{"min_p": 0.1, "top_k": 3, "eos_token_id": 2}', encoding="utf-8")
    source = from_adapters(base, (), TrainedPositions(no_patch_rope=True))
    found = list(genai_warnings(source))
    assert found[0] == "generation_config.json: onnxruntime-genai has no setting for min_p, and does without"
    assert len(found) == (1 if warned is None else 2)
    assert (warned or "") in found[-1]
