"""The exported graph as another program meets it: plain ONNX Runtime, numpy and the manifest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pos2d.layout import build_layout
from pos2d.manifest import read_manifest
from tests.conftest import Golden
from tests.test_layout import spec_of

Feeds = dict[str, np.ndarray]


@pytest.fixture
def directory(qwen2: Golden, artifact_of: Callable[[Golden, str], Path]) -> Path:
    return artifact_of(qwen2, "onnx")


@pytest.fixture
def session(directory: Path) -> ort.InferenceSession:
    return ort.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])


def step(session: ort.InferenceSession, feeds: Feeds, past: Feeds | None) -> tuple[np.ndarray, Feeds]:
    """One pass, as the documentation tells a driver to make it."""
    batch = len(feeds["input_ids"])
    if past is None:
        empty = (i for i in session.get_inputs() if i.name.startswith("past_key_values."))
        past = {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in empty}
    names = [output.name for output in session.get_outputs()]
    logits, *present = session.run(names, feeds | past)
    return logits, dict(zip((n.replace("present", "past_key_values") for n in names[1:]), present, strict=True))


def test_the_checker_accepts_it(directory: Path) -> None:
    onnx.checker.check_model(directory / "model.onnx", full_check=False)


def test_the_manifest_names_its_inputs_and_outputs(directory: Path, session: ort.InferenceSession) -> None:
    graph = read_manifest(directory).graph
    assert graph is not None
    for described, values in ((graph["inputs"], session.get_inputs()), (graph["outputs"], session.get_outputs())):
        assert [(d["name"], d["shape"]) for d in described] == [(v.name, v.shape) for v in values]
    types = {d["name"]: d["dtype"] for d in graph["inputs"]}
    assert (types["input_ids"], types["pos2d"], types["attention_mask"]) == ("int64", "int64", "bool")


def test_a_tied_head_shares_the_embedding(directory: Path) -> None:
    weights = {
        tensor.name for tensor in onnx.load(directory / "model.onnx", load_external_data=False).graph.initializer
    }
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights


def test_chunks_and_steps_of_a_batch_agree_with_one_pass(qwen2: Golden, session: ort.InferenceSession) -> None:
    """Batch, sequence and cache length are all dynamic, together."""
    spec_layouts = [
        build_layout(prompts, spec_of(qwen2), [1, 2, 3]) for prompts in ([[5, 6, 7], [8, 9]], [[15, 16], [18, 19, 20]])
    ]
    feeds = {
        "input_ids": np.stack([layout.ids for layout in spec_layouts]),
        "position_ids": np.stack([layout.positions for layout in spec_layouts]),
        "pos2d": np.stack([layout.pos2d for layout in spec_layouts]),
        "attention_mask": np.stack([layout.mask() for layout in spec_layouts])[:, None],
    }
    whole, _ = step(session, feeds, None)
    past, pieces = None, []
    for first, last in ((0, 4), (4, 7), (7, 8)):
        part = {name: value[:, first:last] for name, value in feeds.items() if name != "attention_mask"}
        part["attention_mask"] = feeds["attention_mask"][:, :, first:last, :last]
        logits, past = step(session, part, past)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=2e-5)


def test_a_driver_made_from_the_documentation_repeats_the_trainer(qwen2: Golden, session: ort.InferenceSession) -> None:
    """Two dozen lines of numpy decode the golden branches; nothing of the runtime is used."""
    branches, stride = qwen2.facts["branch_inputs"], qwen2.facts["stride"]
    tokens = sorted((t, k, token) for k, ids in enumerate(branches) for t, token in enumerate(ids))
    times = np.array([t for t, _, _ in tokens])
    owners = np.array([k for _, k, _ in tokens])
    new_ids = np.array([token for _, _, token in tokens])
    answers: list[list[int]] = [[] for _ in branches]
    past, new = None, len(tokens)
    for _ in range(len(qwen2.facts["multi_generated"][0])):
        slots = np.arange(len(times))
        visible = (times[None, :] < times[-new:, None]) | (slots[None, :] == slots[-new:, None])
        feeds = {
            "input_ids": new_ids[None],
            "position_ids": slots[None, -new:],
            "pos2d": np.stack([owners * stride, times], axis=-1)[None, -new:],
            "attention_mask": visible[None, None],
        }
        logits, past = step(session, feeds, past)
        rows = [int(np.flatnonzero(owners[-new:] == k)[-1]) for k in range(len(branches))]
        new_ids = logits[0, rows].argmax(-1)
        for answer, token in zip(answers, new_ids.tolist(), strict=True):
            answer.append(token)
        times = np.append(times, [times[owners == k].max() + 1 for k in range(len(branches))])
        owners = np.append(owners, np.arange(len(branches)))
        new = len(branches)
    assert answers == qwen2.facts["multi_generated"]
