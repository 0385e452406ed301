"""Batches on workers of Ray: where workers find room, what is refused, and the same bytes as in one process."""

import contextlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from pos2d import runtime
from pos2d.errors import InputError, Pos2DError, UsageError
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.batching.line_answers import LineOptions
from pos2d.runtime.batching.recipe import model_facts
from pos2d.runtime.cluster import connection
from pos2d.runtime.cluster.attempts import MOST, Attempts
from pos2d.runtime.cluster.options import ClusterOptions
from pos2d.runtime.cluster.placement import Machine, check_loading, place_workers
from pos2d.runtime.cluster.worker import FAILURE, FIRST, LINES, RECORDS, Task, WindowWorker
from pos2d.runtime.load import load_opened
from pos2d.runtime.opening.opened_model import open_model
from pos2d.runtime.text.options import request_options
from tests.batch_files import write_lines

Call = Callable[..., Result]
MACHINES = st.lists(st.builds(Machine, st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=5)


@given(MACHINES, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_workers_have_as_many_cores_as_machines_have_room_for(
    machines: list[Machine], workers: int, most: int, on_gpus: bool
) -> None:
    """Never more threads than cores, and one more core each would not fit."""

    def room(cores: int) -> int:
        return sum(min(m.cores // cores, m.gpus) if on_gpus else m.cores // cores for m in machines)

    wanted = min(workers, most)
    try:
        placement = place_workers(machines, most=most, workers=workers, on_gpus=on_gpus)
    except UsageError:
        assert room(1) < wanted
        return
    assert (placement.workers, placement.gpus) == (wanted, int(on_gpus))
    assert room(placement.cores) >= wanted > room(placement.cores + 1)


def test_by_default_a_worker_for_each_machine_or_gpu() -> None:
    machines = [Machine(8, 2), Machine(4), Machine(0)]
    assert place_workers(machines, most=9).workers == 2
    assert place_workers(machines, most=9, on_gpus=True).workers == 2
    assert place_workers(machines, most=1).cores == 8
    assert place_workers(machines, most=9, workers=3, threads=2).cores == 2
    with pytest.raises(UsageError, match="no room for 3 workers with 5 cores each, but for 1; lower `num_workers` or"):
        place_workers(machines, most=9, workers=3, threads=5)
    with pytest.raises(UsageError, match="no machine with a GPU"):
        place_workers([Machine(8)], most=1, on_gpus=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-workers", "2"], "--num-workers has no effect without --engine ray"),
        (["--ray-address", "auto"], "--ray-address has no effect without --engine ray"),
        (["--engine", "ray", "--ray-address", "ray://head:10001"], "Ray Data does not run through Ray Client"),
        (["--engine", "ray", "--num-workers", "0"], "must be 1 to"),
    ],
)
def test_what_cannot_be_used_is_refused(
    call: Call, talking: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n')
    output = tmp_path / "out.jsonl"
    result = call("batch", talking / "onnx", "-i", tmp_path / "in.jsonl", "-o", output, *flags)
    assert result.exit_code == 2
    assert words in result.stderr
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_without_ray_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"`engine='ray'` needs further packages; .*pip install 'pos2d\[ray\]'"):
        ClusterOptions(engine="ray")


@pytest.mark.parametrize(
    ("loading", "words"), [({"device": "cuda:1"}, "Ray chooses the GPU"), ({"device_map": "auto"}, "leave it out")]
)
def test_a_worker_has_the_device_that_ray_gives_it(loading: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_loading(LoadOptions(**loading))


@pytest.mark.parametrize(
    ("address", "words"), [("head", "must be HOST:PORT"), ("127.0.0.1:1", "nothing answers there")]
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        connection.check_reachable(address)


def task_of(place: Path, **changes: Any) -> Task:
    """What a worker gets, as it gets it: pickled."""
    lines = LineOptions(options=request_options(place, {"max_new_tokens": 4}), plain=False, context=None)
    begin = Attempts().begin
    values: dict[str, Any] = {"model": str(place), "loading": LoadOptions(), "load": load_opened, "lines": lines}
    values |= {"done": 0, "begin": begin, "facts": model_facts(open_model(place)), **changes}
    copy: Task = pickle.loads(pickle.dumps(Task(**values)))
    return copy


def test_a_worker_gives_the_records_of_this_process(talking: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", 100)
    runtime.batch(talking / "onnx", source, tmp_path / "out.jsonl", max_new_tokens=4)
    lines = source.read_bytes().splitlines(keepends=True)
    worker = WindowWorker(task_of(talking / "onnx", done=70))
    first, second = (worker.answered({FIRST: n + 1, LINES: b"".join(lines[n : n + 64])}) for n in (0, 64))
    whole = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert first[RECORDS] == b""
    assert second[RECORDS] == b"".join(whole[70:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"facts": {"sha256": {}}}, "is another model than where the run began; copy that one there"),
        ({"version": "0"}, "and 0 where the run began; install that"),
        ({"model": "/nowhere/at/all"}, "every machine must have the model under the same name"),
    ],
)
def test_a_worker_with_another_model_ends_the_run(talking: Path, changes: Any, words: str) -> None:
    row = WindowWorker(task_of(talking / "onnx", **changes)).answered({FIRST: 1, LINES: b'{"prompt": "one"}\n'})
    error = pickle.loads(row[FAILURE])
    assert isinstance(error, InputError)
    assert words in str(error)
    assert "on the machine " in str(error)


def test_a_window_that_ends_its_workers_ends_the_run(talking: Path) -> None:
    worker = WindowWorker(task_of(talking / "onnx"))
    row = {FIRST: 1, LINES: b'{"prompt": "one"}\n' * 2}
    assert [worker.answered(row)[FAILURE] for _ in range(MOST)] == [None] * MOST
    with pytest.raises(Pos2DError, match="answered lines 1 to 2 ended 4 times"):
        raise pickle.loads(worker.answered(row)[FAILURE])


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """One cluster for the tests below, which find it as a caller's own."""
    pytest.importorskip("ray")
    with connection.connected(None) as is_ours:
        assert is_ours
        yield


def kill_a_worker(partial: Path, killed: list[int]) -> None:
    """SIGKILL one worker as soon as there are records; ``killed`` gets its process id."""
    import psutil

    for _ in range(600):
        time.sleep(0.05)
        workers = [child for child in psutil.Process().children(recursive=True) if _is_worker(child)]
        if workers and partial.exists() and partial.stat().st_size:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)
            return


def _is_worker(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return bool(process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"))
    return False


@pytest.mark.usefixtures("_ray")
@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_is_killed_loses_nothing(talking: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", 700)
    runtime.batch(talking / "onnx", source, tmp_path / "local.jsonl", max_new_tokens=8)
    output = tmp_path / "out.jsonl"
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "out.jsonl.partial", killed))
    killer.start()
    report = runtime.batch(talking / "onnx", source, output, max_new_tokens=8, engine="ray", num_workers=2, threads=1)
    killer.join()
    assert killed
    assert output.read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert (report.lines, report.errors) == (700, 70)
    # Both engines continue what the other began.
    whole = output.read_bytes().splitlines(keepends=True)
    note = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    for engine in ("local", "ray"):
        (tmp_path / "out.jsonl.partial").write_bytes(b"".join(whole[:300]))
        (tmp_path / "out.jsonl.partial.json").write_text(json.dumps({"recipe": note["recipe"]}))
        output.unlink()
        given: Any = {"engine": "ray"} if engine == "ray" else {}
        report = runtime.batch(talking / "onnx", source, output, max_new_tokens=8, threads=1, **given)
        assert report.resumed == 300
        assert output.read_bytes() == b"".join(whole)


@pytest.mark.usefixtures("_ray")
@pytest.mark.filterwarnings("ignore")
def test_what_a_worker_refuses_leaves_nothing(talking: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n')
    with pytest.raises(UsageError, match="`dtype`"):
        runtime.batch(talking / "onnx", tmp_path / "in.jsonl", tmp_path / "out.jsonl", engine="ray", dtype="bfloat16")
    assert os.listdir(tmp_path) == ["in.jsonl"]
