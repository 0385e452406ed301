"""The exported graphs as another program uses them: with ONNX Runtime, numpy and the manifest alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pos2d import exporter
from pos2d.layout import Layout, build_layout
from pos2d.manifest import read_manifest
from pos2d.onnx_io import GraphFile
from tests.bounds import logits_bound
from tests.conftest import Golden
from tests.contract.test_layout import spec_of

Feeds = dict[str, np.ndarray]
GRAPHS = ("causal", "general", "batch")


@pytest.fixture
def directory(qwen2: Golden, artifact_of: Callable[[Golden, str], Path]) -> Path:
    return artifact_of(qwen2, "onnx")


def graphs_of(directory: Path) -> Mapping[Any, GraphFile]:
    graph = read_manifest(directory).graph
    assert graph is not None
    files: Mapping[Any, GraphFile] = graph.graphs
    return files


def session_of(directory: Path, graph: str) -> ort.InferenceSession:
    return ort.InferenceSession(directory / graphs_of(directory)[graph].file, providers=["CPUExecutionProvider"])


def empty_past(session: ort.InferenceSession, batch: int, capacity: int = 0) -> Feeds:
    names = (i for i in session.get_inputs() if i.name.startswith("past_key_values."))
    return {i.name: np.zeros((batch, i.shape[1], capacity, i.shape[3]), np.float32) for i in names}


def step(session: ort.InferenceSession, feeds: Feeds, past: Feeds | None) -> tuple[np.ndarray, Feeds]:
    """One pass, made as the documentation describes it."""
    past = empty_past(session, len(feeds["input_ids"])) if past is None else past
    names = [output.name for output in session.get_outputs()]
    logits, *present = session.run(names, feeds | past)
    return logits, dict(zip((n.replace("present", "past_key_values") for n in names[1:]), present, strict=True))


def feeds_of(layout: Layout, start: int, stop: int) -> Feeds:
    new = slice(start, stop)
    return {
        "input_ids": layout.ids[None, new],
        "position_ids": layout.positions[None, new],
        "pos2d": layout.pos2d[None, new],
        "logits_rows": np.arange(stop - start)[None],
        "attention_mask": layout.mask(start, stop)[None, None],
        "seqlens_k": np.array([stop - 1], dtype=np.int32),
    }


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_onnx_checker_accepts_the_graphs(directory: Path, graph: str) -> None:
    """Except for one operator, which is in the standard domain of ONNX Runtime but not in the standard."""
    model = onnx.load(directory / graphs_of(directory)[graph].file)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    onnx.checker.check_model(model, full_check=False)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_manifest_names_its_inputs_and_outputs(directory: Path, graph: str) -> None:
    described, session = graphs_of(directory)[graph], session_of(directory, graph)
    for named, values in ((described.inputs, session.get_inputs()), (described.outputs, session.get_outputs())):
        assert [(d.name, list(d.shape)) for d in named] == [(v.name, v.shape) for v in values]
    types = {d.name: d.dtype for d in described.inputs}
    assert (types["input_ids"], types["pos2d"]) == ("int64", "int64")
    assert types.get("attention_mask", "bool") == "bool"


def test_all_graphs_share_one_weight_file(directory: Path) -> None:
    """A tensor has the same place in the file in every graph; a tied head is the embedding."""
    places: dict[str, set[tuple[str, str]]] = {}
    for graph in GRAPHS:
        model = onnx.load(directory / graphs_of(directory)[graph].file, load_external_data=False)
        for tensor in model.graph.initializer:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            if facts:
                assert facts["location"] == "model.onnx.data"
                places.setdefault(tensor.name, set()).add((facts["offset"], facts["length"]))
    assert all(len(offsets) == 1 for offsets in places.values())
    assert "model.embed_tokens.weight" in places
    assert "lm_head.weight" not in places


def test_a_quantised_tied_head_shares_the_bytes_of_the_embedding(
    qwen2: Golden, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    exporter.export(artifact_of(qwen2, "merged"), tmp_path / "int8", quant="int8", no_verify=True)
    model = onnx.load(tmp_path / "int8" / "model.onnx", load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    assert places["model.embed_tokens.weight"] == places["model.embed_tokens.weight.rows"]
    head = next(node for node in reversed(model.graph.node) if node.op_type == "MatMulNBits")
    assert head.input[1] == "model.embed_tokens.weight"


def test_chunks_agree_with_one_pass(qwen2: Golden, directory: Path) -> None:
    """Sequence length and cache length can both change from pass to pass."""
    session = session_of(directory, "general")
    layout = build_layout([[5, 6, 7], [8, 9]], spec_of(qwen2), [1, 2, 3])
    whole, _ = step(session, feeds_of(layout, 0, len(layout)), None)
    past, pieces = None, []
    for first, last in ((0, 4), (4, 7), (7, 8)):
        logits, past = step(session, feeds_of(layout, first, last), past)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=logits_bound(whole))


def test_the_causal_graph_needs_no_mask(qwen2: Golden, directory: Path) -> None:
    session = session_of(directory, "causal")
    layout = build_layout([qwen2.tensors["single.input_ids"][0].tolist()], spec_of(qwen2))
    past, pieces = None, []
    for first, last in ((0, 5), (5, len(layout))):
        feeds = feeds_of(layout, first, last)
        del feeds["attention_mask"]
        feeds["total_sequence_length"] = np.array(last, dtype=np.int32)
        logits, past = step(session, feeds, past)
        pieces.append(logits)
    expected = qwen2.tensors["single.logits"]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=0, atol=logits_bound(expected))


def test_rows_of_a_batch_have_separate_cache_lengths(qwen2: Golden, directory: Path) -> None:
    """The tokens that the first row has in its cache are not visible to the second."""
    session, general = session_of(directory, "batch"), session_of(directory, "general")
    layouts = [
        build_layout(prompts, spec_of(qwen2), [1, 2, 3]) for prompts in ([[5, 6, 7], [8, 9]], [[15, 16, 17, 18, 19]])
    ]
    capacity, past = 16, empty_past(session, 2, 16)
    spans = [((0, 5), (0, 2)), ((5, 7), (2, 6)), ((7, 8), (6, 8))]
    computed: list[list[np.ndarray]] = [[], []]
    for pair in spans:
        new = max(stop - start for start, stop in pair)
        feeds = {
            "input_ids": np.zeros((2, new), np.int64),
            "position_ids": np.zeros((2, new), np.int64),
            "pos2d": np.zeros((2, new, 2), np.int64),
            "logits_rows": np.broadcast_to(np.arange(new), (2, new)),
            "cache_lengths": np.array([start for start, _ in pair]),
            "attention_mask": np.zeros((2, 1, new, capacity), bool),
        }
        feeds["attention_mask"][..., 0] = True  # a row of padding that attends to nothing would be NaN
        for row, (layout, (start, stop)) in enumerate(zip(layouts, pair, strict=True)):
            here = slice(0, stop - start)
            for name, values in feeds_of(layout, start, stop).items():
                if name in ("input_ids", "position_ids", "pos2d"):
                    feeds[name][row, here] = values[0]
            feeds["attention_mask"][row, 0, here] = np.pad(layout.mask(start, stop), ((0, 0), (0, capacity - stop)))
        logits, past = step(session, feeds, past)
        for row, (start, stop) in enumerate(pair):
            computed[row].append(logits[row, : stop - start])
    for layout, pieces in zip(layouts, computed, strict=True):
        expected, _ = step(general, feeds_of(layout, 0, len(layout)), None)
        np.testing.assert_allclose(np.concatenate(pieces), expected[0], rtol=0, atol=logits_bound(expected))


def test_a_program_written_from_the_documentation_gives_the_tokens_of_the_trainer(
    qwen2: Golden, directory: Path
) -> None:
    """Two dozen lines of numpy decode the golden branches without our runtime."""
    session = session_of(directory, "general")
    branches, stride = qwen2.facts["branch_inputs"], qwen2.facts["stride"]
    tokens = sorted((t, k, token) for k, ids in enumerate(branches) for t, token in enumerate(ids))
    times = np.array([t for t, _, _ in tokens])
    branch_of = np.array([k for _, k, _ in tokens])
    new_ids = np.array([token for _, _, token in tokens])
    answers: list[list[int]] = [[] for _ in branches]
    past, new = None, len(tokens)
    for _ in range(len(qwen2.facts["multi_generated"][0])):
        slots = np.arange(len(times))
        visible = (times[None, :] < times[-new:, None]) | (slots[None, :] == slots[-new:, None])
        rows = [int(np.flatnonzero(branch_of[-new:] == k)[-1]) for k in range(len(branches))]
        feeds = {
            "input_ids": new_ids[None],
            "position_ids": slots[None, -new:],
            "pos2d": np.stack([branch_of * stride, times], axis=-1)[None, -new:],
            "logits_rows": np.array([rows]),
            "attention_mask": visible[None, None],
            "seqlens_k": np.array([len(times) - 1], dtype=np.int32),
        }
        logits, past = step(session, feeds, past)
        new_ids = logits[0].argmax(-1)
        for answer, token in zip(answers, new_ids.tolist(), strict=True):
            answer.append(token)
        times = np.append(times, [times[branch_of == k].max() + 1 for k in range(len(branches))])
        branch_of = np.append(branch_of, np.arange(len(branches)))
        new = len(branches)
    assert answers == qwen2.facts["multi_generated"]
