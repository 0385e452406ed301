"""Everything that the peers run, made from one stock directory into a cache, by the peers' python.

Prints a JSON line for each: seconds, and the peak of the process that made it, which stand beside it from then on;
what exists is not made again. Defaults of every tool, as a user would get them.

    .venv-peers/bin/python benchmarks/peer_models.py PLAIN CACHE --only genai-int4 --again
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GENAI = "{python} -m onnxruntime_genai.models.builder -m {plain} -o {out} -c {out}.cache -e cpu -p"
OPENVINO = "{python} -m optimum.commands.optimum_cli export openvino -m {plain} {out} --task text-generation-with-past"
MODELS = {
    "q8_0.gguf": "{python} {here}/peer_gguf.py {plain} {out} q8_0",
    "q4_0.gguf": "{python} {here}/peer_gguf.py {plain} {out} q4_0",
    "genai-int8": f"{GENAI} int8",
    "genai-int4": f"{GENAI} int4",
    "openvino-int8": f"{OPENVINO} --weight-format int8",
    "openvino-int4": f"{OPENVINO} --weight-format int4 --group-size {{group}}",
}


def make(command: Sequence[str], out: Path, again: bool = False) -> dict[str, Any]:
    """Run what makes ``out``, unless it is there; ``{"seconds", "peak_gb", "gb"}``, or ``{"error"}``.

    The caller should be small: a child's peak begins with that of the process that started it.
    """
    facts = out.with_name(f"{out.name}.json")
    if facts.exists() and not again:
        found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        return found
    for old in (out, out.with_name(f"{out.name}.cache")):
        _remove(old)
    facts.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_name(f"{out.name}.log")
    started = time.perf_counter()
    with log.open("w") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=sink, env=_environment())
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if child.returncode != 0 or not out.exists():
        _remove(out)
        return {"error": f"exit status {child.returncode}; see {log}"}
    made = {"seconds": seconds, "peak_gb": usage.ru_maxrss * 1024 / 1e9, "gb": _size(out) / 1e9}
    facts.write_text(json.dumps(made), encoding="utf-8")
    return made


def _environment() -> Mapping[str, str]:
    """Nobody is asked for anything over the network."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("plain", type=Path)
    arguments.add_argument("cache", type=Path)
    arguments.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS))
    arguments.add_argument("--again", action="store_true", help="Make what exists anew.")
    given = arguments.parse_args()
    width = json.loads((given.plain / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    group = 128 if width % 128 == 0 else 64  # 128 is openvino's own, which refuses rows that it does not divide
    for name in given.only:
        out = (given.cache / name).absolute()
        words = {"python": sys.executable, "here": HERE, "plain": given.plain.absolute(), "out": out}
        words |= {"group": group}
        command = [word.format(**words) for word in MODELS[name].split()]
        print(json.dumps({"name": name} | make(command, out, given.again)), flush=True)


if __name__ == "__main__":
    main()
