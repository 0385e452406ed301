"""The comparison with other engines goes on when one of them cannot be made or crashes."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

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
