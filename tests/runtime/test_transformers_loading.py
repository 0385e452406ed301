"""A merged directory in plain transformers, the newest and 4.57, without any code of this project but its own files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pos2d import exporter, runtime
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer
from tests.bounds import logits_bound
from tests.conftest import CASES, Golden, read_golden

OLD = Path(sys.prefix) / "transformers-4.57"
VERSIONS = {"newest": None, "4.57": OLD}
# Artifacts of the others are of transformers' own classes.
WITH_2D = [name for name in CASES if read_golden(name).facts["ratio"] is not None]

GOLDEN_PROGRAM = """
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
golden = load_file(case + "/golden.safetensors")
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

NEW_BASE_PROGRAM = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("hello", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
print(json.dumps({"version": transformers.__version__, "ids": ids.tolist(), "logits": logits.tolist()}))
"""


def in_transformers(version: str, program: str, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What ``program`` prints as its last line, run without this project on its path."""
    overlay = VERSIONS[version]
    if overlay is not None and not overlay.is_dir():
        pytest.fail(f"{overlay} is missing; run the tests with `make test`")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(overlay or "")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert str(report["version"]).startswith("4.57" if overlay else "5.")
    return report


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WITH_2D)
def test_it_loads_takes_pos2d_and_generates(
    name: str, version: str, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    golden = read_golden(name)
    report = in_transformers(version, GOLDEN_PROGRAM, tmp_path, artifact_of(golden, "merged"), golden.path, "true")
    assert str(report["class"]).startswith("Pos2D")
    assert max(report["differences"].values()) < 1e-4  # of logits up to 4: ten times what float32 gives
    assert report["generated"] == report["padded"] == golden.facts["single_generated"]
    assert "cannot advance pos2d" in str(report["stale"])


@pytest.mark.parametrize("version", VERSIONS)
def test_without_trust_it_refuses(
    qwen2: Golden, version: str, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    report = in_transformers(version, GOLDEN_PROGRAM, tmp_path, artifact_of(qwen2, "merged"), qwen2.path, "false")
    assert "trust_remote_code" in str(report["refused"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", ["llama with llama3 rope", "llama with yarn rope", "qwen3 with wide heads"])
def test_a_base_that_the_newest_transformers_saved_loads_in_both(family: str, version: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS[family])
    write_tokenizer(base)
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    newest = settings | {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    (base / "tokenizer_config.json").write_text(json.dumps(newest), encoding="utf-8")
    exporter.merge(
        base, write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base))), tmp_path / "merged"
    )
    report = in_transformers(version, NEW_BASE_PROGRAM, tmp_path, tmp_path / "merged")
    expected = runtime.load(tmp_path / "merged").logits(report["ids"])
    np.testing.assert_allclose(np.array(report["logits"]), expected, rtol=0, atol=logits_bound(expected))
