"""Comparisons with other engines: they go on when one crashes, find where answers part, and read as SGLang reads."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pos2d.sources.stock_rope import one_branch_rope
from pos2d.spec import Rope2DSpec

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# A worker that answers every request, or ends where its first argument says.
WORKER = """
import json, sys
import numpy as np
ends = sys.argv[1]
if ends == "start":
    sys.exit(3)
print(json.dumps({"import_s": 0.1, "load_s": 0.2, "first_token_s": 0.3}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if ends == ("probe" if "save" in request else "answer"):
        sys.exit(4)
    if "save" in request:
        np.save(request["save"], np.eye(3, dtype=np.float32))
    print(json.dumps({"prefill_s": 1.0, "step_ms": 2.0, "tok_s": 3.0, "total_s": 4.0}), flush=True)
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_peer_that_crashes_loses_its_row_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers
    from peer_inputs import Input

    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def entry(name: str, ends: str, file: str = "plain") -> peers.Entry:
        return peers.Entry(name, 8, sys.executable, (str(script), ends), file)

    reference = entry("reference", "never")
    entries = [entry(f"ends at {point}", point) for point in ("start", "answer", "probe")]
    monkeypatch.setattr(peers, "ENTRIES", (*entries, entry("unmade", "never", "broken.gguf"), reference))
    monkeypatch.setattr(peers, "REFERENCE", reference)
    monkeypatch.setattr(peers, "prepare", lambda _model, _place: Input(tmp_path))
    monkeypatch.setattr(peers, "make_models", lambda *_: {"broken.gguf": {"error": "exit status 1"}})
    monkeypatch.setattr(peers, "_text", lambda _given, count: list(range(count)))

    arguments = ["-n", "1,2", "-r", "2", *(["--json"] if as_json else [])]
    done = CliRunner().invoke(peers.bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if as_json:
        rows = json.loads(done.stdout)
        assert [row["peer"] for row in rows if "lost" not in row] == ["reference"] * 2
        assert {row["peer"]: row["lost"].split(";")[0] for row in rows if "lost" in row} == {
            "ends at start": "it ended with exit status 3",
            "ends at answer": "it ended with exit status 4",
            "ends at probe": "it ended with exit status 4",
            "unmade": "not made: exit status 1",
        }
    else:
        assert sum(line.startswith("reference") for line in done.stdout.splitlines()) == 2
        assert done.stdout.count("lost: ") == 4


def test_first_difference_of_two_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from engine_agreement import first_difference

    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [4]) == 0


@pytest.mark.parametrize(("gap", "equal", "seen"), [(0.0009, 8, [2, 5]), (0.0011, 2, [2]), (None, 2, [2])])
def test_answers_are_followed_behind_a_tie_and_no_further_than_a_difference(
    monkeypatch: pytest.MonkeyPatch, gap: float | None, equal: int, seen: list[int]
) -> None:
    """An engine that says -1 in place of tokens 2 and 5, where our logits are ``gap`` apart, or that stops at 2."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from engine_agreement import follow

    expected = list(range(10))

    def ask(said: Sequence[int]) -> list[int]:
        assert list(said) == expected[: len(said)]
        place = next((place for place in (2, 5) if place >= len(said)), len(expected))
        if gap is None:
            return expected[len(said) : place]
        # Behind the other token, everything may be another.
        return expected[len(said) : place] + [-1] * (len(expected) - place)

    def logits(said: Sequence[int], tokens: list[int]) -> list[float]:
        assert tokens == [len(said), -1]
        return [3.0, 3.0 - (gap or 0)]

    same, partings = follow("text", expected, ask, logits)
    assert (same, [parting.position for parting in partings]) == (equal, seen)
    assert [parting.tied for parting in partings] == [equal == 8] * len(seen)


def test_an_engine_with_other_ids_or_without_stops_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from engine_agreement import Parting
    from engine_check import Found

    def faults(**changes: Any) -> list[str]:
        facts: dict[str, Any] = {"tokens": 8, "equal": 8, "partings": (), "texts": 3, "turns": 3, "stops": 3}
        return Found(**facts | changes, tokens_per_second=1.0).faults

    assert faults() == []
    assert faults(partings=(Parting("chat", 4, 1, 2, 5.0, 5.0005),)) == []
    assert len(faults(partings=(Parting("chat", 4, 1, 2, 5.0, 5.002),))) == 1
    assert faults(partings=(Parting("chat", 4, 1, 2, 25.0, 25.015, bits=16),)) == []  # float16 steps by 2 ** -6 there
    assert len(faults(partings=(Parting("chat", 4, 1, 2, 25.0, 25.017, bits=16),))) == 1
    assert len(faults(partings=(Parting("chat", 4, 1, None, bits=16),))) == 1
    assert len(faults(texts=2, turns=0, stops=2)) == 3


@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_sglang_reads_our_settings_as_one_branch(monkeypatch: pytest.MonkeyPatch, scaling: float) -> None:
    """By its published source; also with a factor of cosines and sines, which it takes from keys of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sglang_reading import difference

    spec = Rope2DSpec(8, (5, 6, 7, 8))
    frequencies = (1e4 ** -(np.arange(8) / 8)).astype(np.float32) / np.float32(1.5)
    config = {"max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 2}
    settings = one_branch_rope(frequencies, scaling, 1e4, 64, spec) | {"rope_theta": 1e4}
    assert difference(config, settings, (frequencies, scaling), spec) < 1e-5
    halved = settings | {"short_factor": [2.0] * 8}
    assert difference(config, halved, (frequencies, scaling), spec) > 0.5
    if scaling != 1:
        without = {key: value for key, value in settings.items() if key != "long_mscale"}
        assert difference(config, without, (frequencies, scaling), spec) > 0.2
