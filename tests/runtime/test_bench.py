"""``bench``: a row for every number of branches, as a table or as JSON, and what it refuses."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from pos2d import runtime
from pos2d.errors import UsageError
from tests.conftest import Golden

ArtifactOf = Callable[[Golden, str], Path]


@pytest.fixture(autouse=True)
def small_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the memory bandwidth over a small array: the figure itself does not matter here."""
    monkeypatch.setattr(sys.modules["pos2d.runtime.bench"], "BANDWIDTH_BYTES", 1 << 16)


def test_the_command_prints_a_table_or_json(
    call: Callable[..., Result], qwen2: Golden, artifact_of: ArtifactOf
) -> None:
    ask = [
        "bench",
        artifact_of(qwen2, "onnx"),
        "--prompt-tokens",
        4,
        "--new-tokens",
        2,
        "--branches",
        "2,1",
        "--rounds",
        1,
    ]
    result = call(*ask)
    assert result.exit_code == 0, result.output
    title, head, *rows, last = result.stdout.splitlines()
    assert title.endswith("onnx float32; prompt of 4 tokens, 2 new tokens per answer, medians of 1 rounds")
    assert head.split()[0] == "branches"
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert len({len(line) for line in (head, *rows)}) == 1
    assert re.fullmatch(r"load to first token [\d.]+ s, peak memory \d+ MB, memory reads [\d.]+ GB/s", last)
    report = json.loads(call(*ask, "--json").stdout)
    assert report["format"] == "onnx float32"
    assert all(row["step_ms"] > 0 and row["bandwidth_share"] > 0 for row in report["rows"])


@pytest.mark.parametrize(
    ("loading", "format"),
    [({}, "merged float32"), ({"dtype": "bfloat16"}, "merged bfloat16"), ({"quant": "8bit"}, "merged 8bit")],
)
def test_the_report_says_what_was_measured(
    qwen2: Golden, artifact_of: ArtifactOf, loading: dict[str, Any], format: str
) -> None:
    few: dict[str, Any] = {"prompt_tokens": 2, "new_tokens": 2, "branches": (1,), "rounds": 1}
    assert runtime.bench(artifact_of(qwen2, "merged"), **few, **loading).format == format


def test_prefill_is_measured_and_not_a_difference(
    qwen2: Golden, artifact_of: ArtifactOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a decode step takes longer than the prompt, for which the difference would be nothing."""
    decode = sys.modules["pos2d.runtime.engine.decode"]
    forward = decode.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return forward(*arguments)

    monkeypatch.setattr(decode, "forward", slow)
    options: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 2, "branches": [1, 3], "rounds": 2}
    for row in runtime.bench(artifact_of(qwen2, "onnx"), **options).rows:
        assert 0 < row.prefill_seconds < 0.05 <= row.step_ms / 1000


def test_converted_weights_have_no_share_of_the_bandwidth(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    """The files do not say how many bytes a step reads."""
    report = runtime.bench(
        artifact_of(qwen2, "merged"), prompt_tokens=4, new_tokens=2, branches=[1], rounds=1, dtype="bfloat16"
    )
    assert report.rows[0].bandwidth_share is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 1}, "`prompt_tokens` 1 must be at least 2"),
        ({"new_tokens": 1}, "`new_tokens` 1 must be at least 2"),
        ({"branches": []}, "`branches` 0 must be at least 1"),
        ({"rounds": 0}, "`rounds` 0 must be at least 1"),
        ({"prompt_tokens": 10**6}, "positions, the model has"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, qwen2: Golden, artifact_of: ArtifactOf) -> None:
    with pytest.raises(UsageError, match=message):
        runtime.bench(artifact_of(qwen2, "merged"), **options)
