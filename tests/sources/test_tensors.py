"""Bytes of tensors: short writes, shared blocks, places that are not aligned, and files that lie."""

import fcntl
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.errors import InputError, OutputError, UnsafeInputError
from pos2d.exporter.artifact import staging
from pos2d.sources.files.tensor_io import SafetensorsFile, pieces, write_at
from pos2d.sources.files.tensor_places import TensorPlace
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base


def test_a_write_may_take_less_than_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    with (tmp_path / "file").open("wb") as file:
        write_at(file.fileno(), memoryview(b"0123456789"), 4)
    assert (tmp_path / "file").read_bytes() == b"\0\0\0\x000123456789"


@pytest.mark.parametrize(("total", "first"), [(10, 0), (10, 3), (2, 3), (3, 3), (0, 0)])
def test_pieces_cover_everything_once(total: int, first: int) -> None:
    found = [byte for start, count in pieces(total, 4, first) for byte in range(start, start + count)]
    assert found == list(range(total))


def test_blocks_are_shared_where_both_places_allow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the system call copies what it is asked to share, so that what it leaves to us is seen."""
    content = bytes(range(256)) * 50
    (tmp_path / "a.safetensors").write_bytes(content)
    shared: list[tuple[int, int, int]] = []

    def clone(target: int, _request: int, packed: bytes) -> None:
        source, start, length, offset = struct.unpack("=qQQQ", packed)
        assert (start | length | offset) % 4096 == 0
        shared.append((start, length, offset))
        os.pwrite(target, os.pread(source, length, start), offset)

    monkeypatch.setattr(fcntl, "ioctl", clone)
    for begin, offset, sharing in ((4096, 8192, [(4096, 4096, 8192)]), (4100, 8192, []), (4096, 8200, [])):
        shared.clear()
        source = SafetensorsFile(tmp_path / "a.safetensors")
        with (tmp_path / "b").open("wb") as target:
            data = memoryview(content[begin : begin + 6000])
            source.copy_to(TensorPlace("a", (6000,), "F32", begin), 0, data, target.fileno(), offset)
        source.close()
        assert shared == sharing
        assert (tmp_path / "b").read_bytes()[offset:] == content[begin : begin + 6000]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), CONFIGS["qwen2 with linear rope"])


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "lora.pth", random_adapter(square(linear_modules(base))))


@pytest.mark.parametrize("spaces", [1, 2, 3, 5])
def test_tensors_that_are_not_aligned_in_their_file(base: Path, lora: Path, tmp_path: Path, spaces: int) -> None:
    """The format allows a header of any length."""
    content = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    odd = tmp_path / "base"
    odd.mkdir()
    (odd / "config.json").write_bytes((base / "config.json").read_bytes())
    header = content[8 : 8 + length] + b" " * spaces
    (odd / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    exporter.merge(odd, lora, tmp_path / "odd")
    exporter.merge(base, lora, tmp_path / "even")
    odd_weights, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("odd", "even"))
    assert all(torch.equal(odd_weights[name], tensor) for name, tensor in weights.items())


def test_noise_is_for_changes_alone(base: Path, lora: Path, tmp_path: Path) -> None:
    exporter.merge(base, lora, tmp_path / "out", dtype="bfloat16", rounding="stochastic")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].bfloat16())


def refused(base: Path, lora: Path, out: Path) -> str:
    with pytest.raises((InputError, UnsafeInputError)) as caught:
        exporter.merge(base, lora, out)
    return str(caught.value)


def test_files_that_lie(base: Path, lora: Path, tmp_path: Path) -> None:
    adapter = torch.load(lora, weights_only=True)
    name = sorted(adapter)[0]
    bomb = write_adapter(tmp_path / "bomb.pth", adapter | {name: torch.zeros(1, 1).expand(4_000_000, 48)})
    assert "mixes the ranks" in refused(base, bomb, tmp_path / "out")
    wide = {n: torch.zeros(1, 1).expand(*((4000, 48) if ".A." in n else (48, 4000))) for n in adapter}
    assert "larger than what the file stores" in refused(
        base, write_adapter(tmp_path / "w.pth", wide), tmp_path / "out"
    )

    headed = tmp_path / "headed"
    headed.mkdir()
    (headed / "config.json").write_bytes((base / "config.json").read_bytes())
    (headed / "model.safetensors").write_bytes((1 << 30).to_bytes(8, "little") + b"{}")
    assert "header of more than 16 MiB" in refused(headed, lora, tmp_path / "out")
    (headed / "model.safetensors").unlink()
    os.mkfifo(headed / "model.safetensors")
    assert "has no model.safetensors" in refused(headed, lora, tmp_path / "out")
    (headed / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}', encoding="utf-8")
    assert "is not a file" in refused(headed, lora, tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}'])
def test_settings_that_cannot_travel_are_refused_before_the_weights(
    base: Path, lora: Path, tmp_path: Path, content: str
) -> None:
    broken = tmp_path / "base"
    broken.mkdir()
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(load_file(base / "model.safetensors"), broken / "model.safetensors")
    (broken / "generation_config.json").write_text(content, encoding="utf-8")
    assert "generation_config.json" in refused(broken, lora, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_systems_without_positioned_reads_and_writes_write_the_same_bytes(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.merge(base, lora, tmp_path / "with", max_shard_size="40KB")
    for name in ("preadv", "pwrite", "O_DIRECTORY", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(staging, "fcntl", None)
    exporter.merge(base, lora, tmp_path / "without", max_shard_size="40KB")
    with_, without = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("with", "without"))
    assert with_ == without


def test_a_workspace_that_is_a_link_is_refused_without_locks(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(staging, "fcntl", None)
    with pytest.raises(OutputError, match="is in the way"):
        exporter.merge(base, lora, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []
