"""What a merge will write and need, before it writes anything."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.exporter.merging.preflight import needs_of
from pos2d.exporter.merging.shards import lay_out_shards
from pos2d.sources.adapters import read_adapters
from pos2d.sources.adapters.deltas import Delta, LowRank, Replaced
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from pos2d.sources.tensors.tensor_plan import plan_tensors
from pos2d.sources.tensors.tying import stays_tied
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_base(write_base(tmp_path_factory.mktemp("tied"), CONFIGS["qwen2 with linear rope"]))


def low_rank(weight: float = 1.0, scale: float = 1.0, first: float = 1.0) -> LowRank:
    a, b = torch.ones(2, 48), torch.ones(300, 2)
    a[0, 0] = first
    return LowRank(weight, a, b, scale)


@pytest.mark.parametrize(
    ("head", "same"),
    [
        ([low_rank()], True),
        ([low_rank(weight=0.5)], False),
        ([low_rank(scale=2.0)], False),
        ([low_rank(first=2.0)], False),
        ([low_rank(), low_rank()], False),
        ([Replaced(1.0, torch.ones(300, 48))], False),
        ([], False),
    ],
)
def test_head_and_embedding_stay_one_tensor_only_where_both_change_alike(
    tied: Checkpoint, head: list[Delta], same: bool
) -> None:
    assert stays_tied(tied, {EMBEDDING: [low_rank()], HEAD: head}) is same
    assert stays_tied(tied, {EMBEDDING: head, HEAD: [low_rank()]}) is same
    assert stays_tied(tied, {"model.norm.weight": head})
    untied = replace(tied, sizes=replace(tied.sizes, tied=False))
    assert not stays_tied(untied, {EMBEDDING: [low_rank()], HEAD: head})


def test_files_of_mixed_types_are_laid_out_as_the_library_does(tied: Checkpoint, tmp_path: Path) -> None:
    types = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    base = write_base(tmp_path / "base", CONFIGS["qwen2 with linear rope"])
    tensors = load_file(base / "model.safetensors")
    mixed = {name: tensor.to(types[number % 4]) for number, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    adapter = random_adapter(square(linear_modules(base)))
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: tensor.dtype for n, tensor in mixed.items()}
    save_file(merged, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_needs_count_the_adapter_and_what_is_there_already(tied: Checkpoint, tmp_path: Path) -> None:
    modules = square(linear_modules(tied.directory))
    needs = {}
    for rank in (4, 400):
        lora = write_adapter(tmp_path / f"{rank}.pth", random_adapter(modules, rank=rank))
        adapters = read_adapters([lora], tied)
        layout = lay_out_shards(plan_tensors(tied, adapters), tied)
        needs[rank] = needs_of(layout, adapters, tmp_path / "out")
    factors = 2 * 48 * (400 - 4)
    least = 4 * len(modules) * factors + 8 * factors  # float32 of all modules, and float64 of one for every thread
    assert needs[400].memory - needs[4].memory >= least
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "shard").write_bytes(bytes(10_000))
    assert needs[400].disk - needs_of(layout, adapters, tmp_path / "out").disk == 10_000
