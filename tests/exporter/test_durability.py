"""What must be on the disk before what, so that a lost supply of power is no worse than a kill."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pos2d import exporter
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base, write_tokenizer

Event = tuple[str, str]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """What a merge of several shards did to the disk, in order: ``(call, name of the file)``."""
    place = tmp_path_factory.mktemp("durability")
    base = write_base(place / "base", CONFIGS["qwen2 with linear rope"], max_shard_size="60KB")
    write_tokenizer(base)
    lora = write_adapter(place / "lora.pth", random_adapter(square(linear_modules(base))))
    found: list[Event] = []

    def name_of(file: Any) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
        return path.relative_to(place).as_posix() if path.is_relative_to(place) else ""

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found.append((function.__name__, name_of(arguments[0])))
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for function in (os.pwrite, os.fsync, os.replace, os.rename):
            patch.setattr(os, function.__name__, traced(function))
        exporter.merge(base, lora, place / "out")
    return found


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")
ARTIFACT, JOURNAL = ".out.partial/artifact", ".out.partial/journal"


def test_a_shard_is_on_the_disk_before_the_journal_names_it(events: list[Event]) -> None:
    shards = sorted({name for call, name in events if call == "pwrite"})
    assert len(shards) == 4
    notes = [place for place, event in enumerate(events) if event == ("replace", f"{JOURNAL}.new")]
    assert len(notes) == 4
    for shard, noted in zip(shards, notes, strict=True):
        written = max(place for place, event in enumerate(events) if event == ("pwrite", shard))
        assert ("fsync", shard) in events[written:noted]


def test_the_journal_is_on_the_disk_before_it_takes_its_place(events: list[Event]) -> None:
    """And so is its place, before it is replaced again."""
    own = [event for event in events if event[1] in (f"{JOURNAL}.new", ".out.partial")]
    assert own == [("fsync", f"{JOURNAL}.new"), ("replace", f"{JOURNAL}.new"), ("fsync", ".out.partial")] * 4


def test_everything_is_on_the_disk_before_the_output_takes_its_place(events: list[Event]) -> None:
    renamed = events.index(("rename", ARTIFACT))
    synced = {name for call, name in events[:renamed] if call == "fsync"}
    names = {"config.json", "manifest.json", "tokenizer.json", "model.safetensors.index.json", "modeling_pos2d.py"}
    assert {f"{ARTIFACT}/{name}" for name in names} | {ARTIFACT} <= synced
    last = [event for event in events[:renamed] if event[0] == "fsync"][-1]
    assert last == ("fsync", ARTIFACT)
    # Until its directory is on the disk, a rename may be forgotten.
    assert ("fsync", ".") in events[renamed:]
