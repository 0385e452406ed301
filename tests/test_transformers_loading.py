"""A merged directory in plain transformers, the newest and 4.57, without any code of this project but its own files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Golden

OLD = Path(sys.prefix) / "transformers-4.57"
VERSIONS = {"newest": None, "4.57": OLD}

PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

directory, case, trust = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
try:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust)
except ValueError as error:
    print(json.dumps({"version": transformers.__version__, "refused": str(error)}))
    sys.exit()
golden = load_file(case)
report = {"version": transformers.__version__, "class": type(model).__name__, "differences": {}}
with torch.no_grad():
    for layout in ("multi", "context"):
        if f"{layout}.logits" in golden:
            given = {name: golden[f"{layout}.{name}"] for name in ("input_ids", "position_ids", "pos2d")}
            found = model(**given).logits
            report["differences"][layout] = float((found - golden[f"{layout}.logits"]).abs().max())
    single = golden["single.input_ids"]
    report["differences"]["single"] = float((model(single).logits - golden["single.logits"]).abs().max())
    padded = torch.cat([torch.zeros_like(single), single], dim=1)
    mask = (torch.arange(padded.shape[1]) >= single.shape[1]).long()[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    report["generated"] = model.generate(single, **options)[0, single.shape[1] :].tolist()
    report["padded"] = model.generate(padded, attention_mask=mask, **options)[0, padded.shape[1] :].tolist()
    try:
        model.generate(single, pos2d=torch.zeros(1, single.shape[1], 2, dtype=torch.long), **options)
    except ValueError as error:
        report["stale"] = str(error)
assert not {"pos2d", "exporter", "runtime"} & set(sys.modules)
print(json.dumps(report))
"""


def in_transformers(version: str, merged: Path, golden: Golden, trust: bool, tmp_path: Path) -> dict[str, object]:
    overlay = VERSIONS[version]
    if overlay is not None and not overlay.is_dir():
        pytest.fail(f"{overlay} is missing; run the tests with `make test`")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(overlay or "")}
    arguments = [str(merged), str(golden.path / "golden.safetensors"), json.dumps(trust)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert str(report["version"]).startswith("4.57" if overlay else "5.")
    return report


@pytest.mark.parametrize("version", VERSIONS)
def test_it_loads_takes_pos2d_and_generates(
    golden: Golden, version: str, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    report = in_transformers(version, artifact_of(golden, "merged"), golden, True, tmp_path)
    assert str(report["class"]).startswith("Pos2D")
    assert max(report["differences"].values()) < 1e-4  # type: ignore[attr-defined]
    assert report["generated"] == report["padded"] == golden.facts["single_generated"]
    assert "cannot advance pos2d" in str(report["stale"])


@pytest.mark.parametrize("version", VERSIONS)
def test_without_trust_it_refuses(
    qwen2: Golden, version: str, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    report = in_transformers(version, artifact_of(qwen2, "merged"), qwen2, False, tmp_path)
    assert "trust_remote_code" in str(report["refused"])
