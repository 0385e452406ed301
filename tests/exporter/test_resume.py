"""An output is absent, old and whole, or new and whole, whenever a run ends; what was finished can be gone on from."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from pos2d import exporter
from pos2d.errors import InputError, OutputError, StorageError
from pos2d.exporter.artifact import staging
from pos2d.exporter.merging import shard_writer
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base, write_tokenizer
from tests.kill_points import tree
from tests.terminal import shown_on_terminal

ROOT = Path(__file__).resolve().parents[2]
Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A base in four shards, and an adapter."""
    place = tmp_path_factory.mktemp("inputs")
    base = write_base(place / "base", CONFIGS["qwen2 with linear rope"], max_shard_size="60KB")
    write_tokenizer(base)
    assert len(list(base.glob("*.safetensors"))) == 4
    return base, write_adapter(place / "lora.pth", random_adapter(square(linear_modules(base))))


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    exporter.merge(*inputs, tmp_path_factory.mktemp("whole") / "out")
    return tree(tmp_path_factory.getbasetemp() / "whole0" / "out")


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture
def interrupted(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Path]:
    """An output whose merge was ended by an error after two of its four shards."""

    def make(error: BaseException) -> Path:
        write_shard, calls = shard_writer._write_shard, []

        def failing(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == 3:
                raise error
            return write_shard(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(shard_writer, "_write_shard", failing)
            with pytest.raises((type(error), StorageError)):
                exporter.merge(*inputs, tmp_path / "out")
        return tmp_path / "out"

    return make


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_killed_at_every_write_point(inputs: Inputs, tmp_path: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "tests.kill_points", *map(str, inputs), str(tmp_path), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_what_is_finished_is_kept_and_gone_on_from(
    interrupted: Callable[[BaseException], Path],
    inputs: Inputs,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    output = interrupted(error)
    assert not output.exists()
    with pytest.raises(OutputError, match=r"interrupted; continue with `resume=True`"):
        exporter.merge(*inputs, output)
    written: list[str] = []
    write_shard = shard_writer._write_shard

    def counting(shard: object, *arguments: object) -> object:
        written.append(shard.file)  # type: ignore[attr-defined]
        return write_shard(shard, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_writer, "_write_shard", counting)
    exporter.merge(*inputs, output, resume=True)
    assert written == ["model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert tree(output) == whole
    assert list(output.parent.iterdir()) == [output]


def test_a_finished_shard_that_was_damaged_is_written_again(
    interrupted: Callable[[BaseException], Path], inputs: Inputs, whole: dict[str, bytes]
) -> None:
    output = interrupted(KeyboardInterrupt())
    shard = output.parent / ".out.partial" / "artifact" / "model-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    exporter.merge(*inputs, output, resume=True)
    assert tree(output) == whole


@pytest.mark.parametrize("damage", ["header", "cut", "grown", "gone", "not noted"])
def test_whatever_happened_to_a_finished_shard_is_noticed(
    interrupted: Callable[[BaseException], Path], inputs: Inputs, whole: dict[str, bytes], damage: str
) -> None:
    output = interrupted(KeyboardInterrupt())
    workspace = output.parent / ".out.partial"
    shard = workspace / "artifact" / "model-00001-of-00004.safetensors"
    content = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    elif damage == "not noted":
        journal = json.loads((workspace / "journal.json").read_text(encoding="utf-8"))
        journal["shards"][shard.name].popitem()
        (workspace / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
    else:
        edits = {"header": content.replace(b'"pt"', b'"tp"', 1), "cut": content[:-2], "grown": content + b" "}
        shard.write_bytes(edits[damage])
    exporter.merge(*inputs, output, resume=True)
    assert tree(output) == whole


def test_force_starts_over(
    interrupted: Callable[[BaseException], Path], inputs: Inputs, whole: dict[str, bytes]
) -> None:
    output = interrupted(KeyboardInterrupt())
    exporter.merge(*inputs, output, force=True)
    assert tree(output) == whole
    assert list(output.parent.iterdir()) == [output]


def test_other_inputs_are_not_mixed_in(interrupted: Callable[[BaseException], Path], inputs: Inputs) -> None:
    output = interrupted(KeyboardInterrupt())
    with pytest.raises(
        OutputError, match=r"another merge, which differs in rope_2d; `resume=True` needs the same inputs"
    ):
        exporter.merge(*inputs, output, resume=True, branch_stride=7)
    with pytest.raises(OutputError, match="differs in options"):
        exporter.merge(*inputs, output, resume=True, dtype="bfloat16")
    journal = output.parent / ".out.partial" / "journal.json"
    content = json.loads(journal.read_text(encoding="utf-8"))
    content["recipe"]["base_files"]["model-00001-of-00004.safetensors"][1] += 1
    journal.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(OutputError, match="differs in base_files"):
        exporter.merge(*inputs, output, resume=True)
    journal.write_text("{", encoding="utf-8")
    with pytest.raises(OutputError, match=r"journal\.json cannot be read .* start over with `force=True`"):
        exporter.merge(*inputs, output, resume=True)


def test_bad_input_leaves_nothing(interrupted: Callable[[BaseException], Path]) -> None:
    output = interrupted(InputError("the base is damaged"))
    assert list(output.parent.iterdir()) == []


def test_resume_without_anything_to_resume_is_a_merge(inputs: Inputs, tmp_path: Path, whole: dict[str, bytes]) -> None:
    first = exporter.merge(*inputs, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == whole
    again = exporter.merge(*inputs, tmp_path / "out", resume=True)
    assert again.totals == first.totals
    with pytest.raises(OutputError, match="exists already"):
        exporter.merge(*inputs, tmp_path / "out", resume=True, branch_stride=7)
    assert tree(tmp_path / "out") == whole


def test_resume_of_a_finished_output_looks_at_the_weights_of_the_base(inputs: Inputs, tmp_path: Path) -> None:
    """Two bases may differ in their weights alone."""
    base, lora = inputs
    exporter.merge(base, lora, tmp_path / "out")
    other = write_base(tmp_path / "base", CONFIGS["qwen2 with linear rope"], max_shard_size="60KB", seed=5)
    write_tokenizer(other)
    with pytest.raises(OutputError, match="exists already"):
        exporter.merge(other, lora, tmp_path / "out", resume=True)


@pytest.mark.parametrize("exchanges", [True, False])
def test_force_replaces_an_artifact(
    inputs: Inputs, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    exporter.merge(*inputs, tmp_path / "out", branch_stride=7)
    assert tree(tmp_path / "out") != whole
    exporter.merge(*inputs, tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == whole
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_force_loses_nothing_of_anybody_else(inputs: Inputs, tmp_path: Path, whole: dict[str, bytes]) -> None:
    exporter.merge(*inputs, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which is not part of an artifact; choose another"):
        exporter.merge(*inputs, tmp_path / "out", force=True)
    (tmp_path / "out" / "notes.txt").unlink()
    assert tree(tmp_path / "out") == whole
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is not a directory"):
            exporter.merge(*inputs, tmp_path / name, force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        exporter.merge(*inputs, tmp_path / "home", force=True)


def test_two_runs_do_not_write_one_output(inputs: Inputs, tmp_path: Path, whole: dict[str, bytes]) -> None:
    workspace = tmp_path / ".out.partial"
    workspace.mkdir()
    with open_directory(workspace) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for force, resume in ((False, False), (True, False), (False, True)):
            with pytest.raises(OutputError, match="is being written by another run"):
                exporter.merge(*inputs, tmp_path / "out", force=force, resume=resume)
    exporter.merge(*inputs, tmp_path / "out")  # a lock that nobody holds is nobody's
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("appears", ["directory", "file", "note in the artifact"])
def test_what_appears_meanwhile_is_left_alone(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, appears: str
) -> None:
    output, sync_tree = tmp_path / "out", staging._sync_tree
    if appears == "note in the artifact" and force:
        exporter.merge(*inputs, output, branch_stride=7)

    def appear(directory: Path) -> None:
        sync_tree(directory)
        if appears == "file":
            output.write_text("mine", encoding="utf-8")
            return
        output.mkdir(exist_ok=True)
        (output / "mine").touch()

    monkeypatch.setattr(staging, "_sync_tree", appear)
    with pytest.raises(OutputError, match="exists already and"):
        exporter.merge(*inputs, output, force=force)
    assert output.is_file() if appears == "file" else (output / "mine").exists()


@pytest.mark.parametrize("what", ["link", "file", "foreign directory", "link inside"])
def test_what_lies_where_a_merge_works_is_not_touched(inputs: Inputs, tmp_path: Path, what: str) -> None:
    precious, workspace = tmp_path / "docs", tmp_path / ".out.partial"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    if what == "link":
        workspace.symlink_to(precious)
    elif what == "file":
        workspace.touch()
    elif what == "foreign directory":
        precious.rename(workspace)
        precious = workspace
    else:
        workspace.mkdir()
        (workspace / "artifact").symlink_to(precious)
    for force, resume in ((False, False), (True, False), (False, True)):
        with pytest.raises(OutputError, match="move it away"):
            exporter.merge(*inputs, tmp_path / "out", force=force, resume=resume)
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]


def test_a_lock_of_a_workspace_that_is_gone_is_no_lock(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    """Between opening the directory and locking it, the run that had made it may have ended and another begun."""
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        (tmp_path / ".out.partial").rename(tmp_path / "old")
        (tmp_path / ".out.partial").mkdir()
        flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(OutputError, match="is being written by another run"):
            exporter.merge(*inputs, tmp_path / "out")
    exporter.merge(*inputs, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("dies", [False, True])
def test_without_exchange_the_old_artifact_comes_back(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], dies: bool
) -> None:
    """The second of two renames fails, or the run ends between them."""
    output, rename = tmp_path / "out", os.rename
    exporter.merge(*inputs, output, branch_stride=7)
    former = tree(output)

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "artifact":
            raise KeyboardInterrupt if dies else OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_exchange", lambda *_: False)
        patch.setattr(os, "rename", failing)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            exporter.merge(*inputs, output, force=True)
    assert dies or tree(output) == former
    with pytest.raises(OutputError, match=r"exists already; choose another output, or replace"):
        exporter.merge(*inputs, output)
    assert tree(output) == former
    exporter.merge(*inputs, output, force=True)
    assert tree(output) == whole


def test_a_finished_output_is_believed_by_its_hashes(inputs: Inputs, tmp_path: Path) -> None:
    for name in ("model-00002-of-00004.safetensors", "config.json"):
        exporter.merge(*inputs, tmp_path / "out", force=True)
        content = bytearray((tmp_path / "out" / name).read_bytes())
        content[-2] ^= 1
        (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(OutputError, match="exists already"):
            exporter.merge(*inputs, tmp_path / "out", resume=True)


def test_a_finished_output_is_told_from_one_with_other_companions(
    inputs: Inputs, tmp_path: Path, call: Callable[..., Result]
) -> None:
    """The tokenizer's files belong to what is resumed: an output with older ones is not what this merge makes."""
    base, lora = shutil.copytree(inputs[0], tmp_path / "base"), inputs[1]
    flags = ("merge", "--base-model", base, "--lora", lora, "-o", tmp_path / "out", "--resume")
    assert "written" not in call(*flags).stdout
    made = tree(tmp_path / "out")
    again = call(*flags)
    assert (again.exit_code, "was finished already, nothing was written" in again.stdout) == (0, True)
    assert exporter.merge(base, lora, tmp_path / "out", resume=True).was_finished
    assert tree(tmp_path / "out") == made
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        exporter.merge(base, lora, tmp_path / "out", resume=True)
    assert not exporter.merge(base, lora, tmp_path / "out", resume=True, force=True).was_finished
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_other_weights_of_the_same_size_and_time_are_not_mixed_in(
    interrupted: Callable[[BaseException], Path], inputs: Inputs, tmp_path: Path
) -> None:
    """The second of two finished shards was made from weights that the base no longer has."""
    output = interrupted(KeyboardInterrupt())
    base = shutil.copytree(inputs[0], tmp_path / "copy")  # with all times
    shard = base / "model-00002-of-00004.safetensors"
    time, content = shard.stat().st_mtime_ns, bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(time, time))
    (tmp_path / "base").symlink_to(base)
    with pytest.raises(
        OutputError, match=r"00002-of-00004\.safetensors was not made from those that are in .*base now"
    ):
        exporter.merge(tmp_path / "base", inputs[1], output, resume=True)
    shard.write_bytes((inputs[0] / shard.name).read_bytes())
    os.utime(shard, ns=(time, time))
    assert not exporter.merge(tmp_path / "base", inputs[1], output, resume=True).was_finished


def test_a_dry_run_leaves_what_can_be_resumed(
    interrupted: Callable[[BaseException], Path], inputs: Inputs, whole: dict[str, bytes]
) -> None:
    output = interrupted(KeyboardInterrupt())
    before = tree(output.parent)
    assert exporter.merge(*inputs, output, resume=True, dry_run=True).dry_run
    assert tree(output.parent) == before
    exporter.merge(*inputs, output, resume=True)
    assert tree(output) == whole


def test_needs_are_checked_before_the_first_byte(
    inputs: Inputs, tmp_path: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    base, lora = inputs
    flags = ("merge", "--base-model", base, "--lora", lora, "-o", tmp_path / "out")
    dry = call(*flags, "--dry-run", "--json")
    assert dry.exit_code == 0
    report = json.loads(dry.stdout)
    assert report["dry_run"]
    assert report["ledger"] is None
    assert list(tmp_path.iterdir()) == []
    made = exporter.merge(*inputs, tmp_path / "other")
    written = sum(path.stat().st_size for path in (tmp_path / "other").glob("*.safetensors"))
    assert made.needs.disk - written == 32 << 20
    assert " of disk (" in call(*flags, "--dry-run").stdout

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        refused = call(*flags)
    assert (refused.exit_code, "MB, its disk has 1 kB free" in refused.stderr) == (5, True)
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    refused = call(*flags)
    assert (refused.exit_code, " of memory, 1 kB are available" in refused.stderr) == (5, True)
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def test_progress_is_in_bytes_and_for_terminals_only(inputs: Inputs, tmp_path: Path) -> None:
    base, lora = inputs
    flags = ["merge", "--base-model", base, "--lora", lora, "--rope-2d-ratio", "0.5", "-o", tmp_path / "out", "--force"]
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, flags)]
    assert subprocess.run(command, check=True, capture_output=True).stderr == b""

    shown = shown_on_terminal(command, ("stderr",), 120)
    kilobytes = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) / 1000
    assert "merging" in shown
    assert f"/{kilobytes:.1f} kB" in shown
