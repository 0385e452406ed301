"""``plan`` and its arithmetic: estimates equal what files and caches take, and every command can be run."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from pos2d import exporter, runtime
from pos2d.commands.plan import plan_text
from pos2d.errors import InputError, StorageError, UsageError
from pos2d.exporter.plan import PlanReport
from pos2d.exporter.planning.footprint import (
    HEADER_ENTRY_BYTES,
    Footprint,
    Format,
    Workload,
    activation_bytes,
    cpu_memory,
    disk_bytes,
    gpu_memory,
    weight_bytes,
)
from pos2d.exporter.planning.graph_footprint import default_layout, stored_weights
from pos2d.exporter.quantisation.held_out import reference_bytes
from pos2d.families import Dimensions, expected_tensors
from pos2d.manifest import read_manifest
from pos2d.memory_costs import (
    GRAPH_PREFILL_CHUNK,
    TORCH_PREFILL_CHUNK,
    check_memory_fits,
    kv_cache_bytes,
    least_memory,
)
from pos2d.onnx_io import DATA_FILE
from pos2d.runtime.backends.onnx.backend import OnnxBackend
from pos2d.runtime.backends.torch.backend import TorchBackend
from pos2d.sources.checkpoints.checkpoint import EMBEDDING
from pos2d.units import parse_size, size_text
from tests.bases import (
    CONFIGS,
    HALF_BILLION,
    SHAPE,
    linear_modules,
    random_adapter,
    square,
    weights,
    write_adapter,
    write_base,
)
from tests.conftest import GOLDENS, Golden

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
BASE = GOLDENS / "qwen2_r050_left" / "base"
FORMATS = [
    *(Format("merged", dtype) for dtype in ("float32", "bfloat16", "float16")),
    Format("bnb", "bfloat16", "8bit"),
    Format("bnb", "bfloat16", "nf4"),
    *(Format("onnx", dtype, quant) for dtype in ("float32", "float16") for quant in (None, "int8", "int4")),
]
# The shape of a public model, so that weights outweigh the constants.
LARGE = Dimensions(
    family="qwen2",
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocab=152064,
    context_length=32768,
    norm_eps=1e-6,
    tied=False,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


def sizes_of(directory: Path) -> Dimensions:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return Dimensions.from_config(config, "config.json")


@pytest.fixture
def available_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Pretend that this much memory is available."""

    def pretend(available: float) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(available), total=1 << 40))

    return pretend


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base of every family, and an adapter for it."""
    base = write_base(tmp_path / "base", CONFIGS[request.param])
    modules = linear_modules(base)
    return base, write_adapter(tmp_path / "lora.pth", random_adapter(square(modules) or modules))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_bytes_of_a_merge(family: tuple[Path, Path], dtype: str, tmp_path: Path) -> None:
    base, lora = family
    exporter.merge(base, lora, tmp_path / "merged", dtype=dtype)
    sizes, form = sizes_of(base), Format("merged", dtype)
    file = tmp_path / "merged" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert weight_bytes(sizes, form) == file.stat().st_size - header
    assert disk_bytes(sizes, form) - weight_bytes(sizes, form) == pytest.approx(header, rel=0.25)


@pytest.mark.parametrize(("quant", "dtype"), [(None, "float32"), ("int8", "float32"), ("int4", "float16")])
def test_disk_bytes_of_a_graph(family: tuple[Path, Path], quant: Any, dtype: str, tmp_path: Path) -> None:
    base, lora = family
    exporter.export(None, tmp_path / "onnx", base_model=base, lora=lora, quant=quant, dtype=dtype, no_verify=True)
    sizes, form = sizes_of(base), Format("onnx", dtype, quant)
    file_sizes = {path.name: path.stat().st_size for path in (tmp_path / "onnx").glob("model*.onnx*")}
    data = file_sizes.pop(DATA_FILE)
    assert default_layout(sizes, dtype, quant).nbytes == data
    assert disk_bytes(sizes, form) - data == pytest.approx(sum(file_sizes.values()), rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_is_what_merge_and_export_write(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every format, with the defaults that the commands of the plan have, but for the check at the end."""
    config = LlamaConfig(**{**SHAPE, "hidden_size": 192, "intermediate_size": 512})
    base = write_base(tmp_path / "base", config)
    stored = {name: tensor.to(dtype) for name, tensor in weights(base).items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    planned = {candidate.name: candidate for candidate in exporter.plan(base).candidates}
    assert {f"onnx {quant}" for quant in ("int8", "int4", "auto")} | {"bnb 8bit", "bnb nf4"} < set(planned)
    for name, candidate in planned.items():
        output, form = tmp_path / name, candidate.form
        unwritten = 0
        options: dict[str, Any] = {"format": form.kind, "quant": form.quant or "none"}
        if form.kind == "stock":
            options["dtype"] = form.dtype
        if form.kind == "onnx":
            options["no_verify"] = True
            unwritten = reference_bytes(int(SHAPE["vocab_size"]), 512) if form.quant else 0
        if form.quant == "auto":
            options["target_size"] = str(default_layout(sizes_of(base), "float32", "auto").nbytes)
        exporter.export(base, output, **options)
        written = read_manifest(output).total_bytes + unwritten
        assert candidate.disk == pytest.approx(written, rel=0.003), name


def test_an_embedding_whose_rows_are_no_blocks_is_not_quantised() -> None:
    # Nor is the head, which shares its bytes.
    odd = replace(LARGE, hidden=56, tied=True)
    blocks = {weight.name: weight.blocks for weight in stored_weights(odd, "float32", "int4")}
    assert [name for name in blocks if blocks[name] == 0 and "bias" not in name and "norm" not in name] == [EMBEDDING]


def test_extra_weight_bytes_are_added() -> None:
    form, work = Format("onnx", "float32", "int4"), Workload.of(1, 64)
    assert cpu_memory(LARGE, form, work, extra_weight_bytes=1000).peak == cpu_memory(LARGE, form, work).peak + 1000


def test_dimensions_of_a_graph(qwen2: Golden, artifact_of: Callable[[Golden, str], Path]) -> None:
    from pos2d.exporter.planning.candidates import artifact_sizes

    assert artifact_sizes(artifact_of(qwen2, "onnx"))[0] == sizes_of(BASE)


@pytest.mark.parametrize(("quant", "settings"), [("8bit", {"load_in_8bit": True}), ("nf4", {"load_in_4bit": True})])
def test_disk_bytes_of_a_quantised_model(quant: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    config = BitsAndBytesConfig(**settings, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "quantised")
    file = tmp_path / "quantised" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    sizes, form = sizes_of(base), Format("bnb", "bfloat16", quant)
    states = len(linear_modules(base)) * 20  # the JSON of a state is longer where the layer is larger
    assert weight_bytes(sizes, form) == pytest.approx(file.stat().st_size - header, abs=states)
    assert disk_bytes(sizes, form) == pytest.approx(file.stat().st_size, abs=header // 3)


def test_bytes_of_the_kv_cache(qwen2: Golden, model_of: Callable[[Golden, str], runtime.Model]) -> None:
    model = model_of(qwen2, "onnx")
    cache: Any = model.backend.new_cache(24)
    held = sum(buffer.numpy().nbytes for buffer in cache._buffers.values())
    assert kv_cache_bytes(sizes_of(BASE), cache.capacity, "float32") == held


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name} {form.dtype}")
def test_larger_workloads_need_more_memory(form: Format) -> None:
    few, more, longer = Workload.of(1, 2048), Workload.of(8, 2048), Workload.of(1, 8192)
    for measure in (cpu_memory, gpu_memory):
        used, side_by_side, long = (measure(LARGE, form, work) for work in (few, more, longer))
        assert used.peak <= side_by_side.peak
        assert used.peak <= long.peak
        assert used.cache + used.activations < side_by_side.cache + side_by_side.activations
        assert used.weights + used.cache < long.weights + long.cache
        assert used.peak >= used.process + used.weights + used.cache + used.activations
        assert used.peak < measure(replace(LARGE, layers=29), form, few).peak
    wider = Workload(2048, 1024, 1) if form.kind != "onnx" else Workload(2048, GRAPH_PREFILL_CHUNK, 2)
    assert activation_bytes(LARGE, form, wider) > activation_bytes(LARGE, form, few)


def test_prefill_chunks_are_those_of_the_backends() -> None:
    assert (TorchBackend.prefill_chunk, OnnxBackend.prefill_chunk) == (TORCH_PREFILL_CHUNK, GRAPH_PREFILL_CHUNK)
    assert Workload.of(4, 100) == Workload(positions=100, pass_tokens=100, logits_rows=4)
    assert Workload.of(4, 10_000) == Workload(positions=10_000, pass_tokens=TORCH_PREFILL_CHUNK, logits_rows=4)


def test_smaller_dtypes_need_less() -> None:
    disk = [disk_bytes(LARGE, form) for form in FORMATS]
    assert disk[0] > disk[1] == disk[2] > disk[3] > disk[4]
    peaks = [gpu_memory(LARGE, form, Workload.of(1, 4096)).peak for form in FORMATS[:5]]
    assert peaks == sorted(peaks, reverse=True)
    graphs = FORMATS[5:8]
    for sizes in (disk[5:8], [cpu_memory(LARGE, form, Workload.of(1, 4096)).peak for form in graphs]):
        assert sizes == sorted(sizes, reverse=True)
    tied = replace(LARGE, tied=True)
    head = LARGE.vocab * LARGE.hidden * 2
    assert disk_bytes(LARGE, FORMATS[1]) - disk_bytes(tied, FORMATS[1]) == head + HEADER_ENTRY_BYTES


def test_the_peak_is_while_loading_or_while_running() -> None:
    assert Footprint.of(1, 2, 3, 4, loading=20).peak == 21
    assert Footprint.of(1, 2, 3, 4, loading=5).peak == 10


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("500MB", 5e8), ("12GiB", 12 << 30), ("8e9", 8e9), ("1.5 kb", 1500), (" 7 ", 7), (123, 123)],
)
def test_sizes(text: str | int, size: float) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-8GB", "0", "0.1", "nan", "inf", "1e999", "8 G B", "eight"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=f"`x` {re.escape(repr(text))}.*such as 8GB"):
        parse_size(text, "x")


def test_size_text() -> None:
    assert [size_text(n) for n in (12, 1500, 988_097_824, 999_900_000, 15_231_000_000)] == [
        "12 B",
        "1.5 kB",
        "988 MB",
        "1.00 GB",
        "15.23 GB",
    ]


def parse(command: str) -> dict[str, Any]:
    """Parse a command with click, which raises on unknown or invalid flags."""
    from pos2d.commands.main import command_of

    program, name, *arguments = shlex.split(command)
    assert program == "pos2d"
    return command_of(name).make_context(name, arguments).params


def test_every_command_can_be_parsed(tmp_path: Path, qwen2: Golden, artifact_of: Callable[[Golden, str], Path]) -> None:
    spaced = tmp_path / "a base; with spaces"
    spaced.symlink_to(BASE)
    for model in (spaced, artifact_of(qwen2, "merged"), artifact_of(qwen2, "onnx")):
        for gpu_bytes in (None, "8GB"):
            for candidate in exporter.plan(model, gpu_memory=gpu_bytes).candidates:
                for command in candidate.commands:
                    assert parse(command)


@pytest.fixture
def half_billion(tmp_path: Path) -> Path:
    """A base of a public model's shape in bfloat16; its weights are a hole in the file, since nothing may read them."""
    (tmp_path / "config.json").write_text(json.dumps(HALF_BILLION), encoding="utf-8")
    sizes = sizes_of(tmp_path)
    entries, end = {}, 0
    for name, shape in expected_tensors(sizes).items():
        start, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return tmp_path


def test_the_best_format_that_fits_in_memory(half_billion: Path, available_memory: Callable[[float], None]) -> None:
    peaks = {candidate.name: candidate.ram.peak for candidate in exporter.plan(half_billion).candidates}

    def on_cpu(available: float) -> str | None:
        available_memory(available)
        return exporter.plan(half_billion).recommended

    order = ("onnx int8", "bnb 8bit", "onnx int4", "bnb nf4")
    assert on_cpu(1e12) == "onnx int8"
    for available in (peaks[name] + more for name in order for more in (0, -1)):
        assert on_cpu(available) == next((name for name in order if peaks[name] <= available), None)


def test_the_best_format_that_fits_on_a_gpu(
    half_billion: Path, available_memory: Callable[[float], None], call: Call
) -> None:
    available_memory(0)
    peaks = {c.name: c.vram.peak for c in exporter.plan(half_billion).candidates if c.vram}

    def on_gpu(size: int) -> PlanReport:
        return exporter.plan(half_billion, gpu_memory=size)

    assert on_gpu(10**12).recommended == "stock bfloat16"
    for name in ("stock bfloat16", "bnb 8bit", "bnb nf4"):
        report = on_gpu(peaks[name])
        assert report.recommended == name
        assert plan_text(report).splitlines()[-2].strip().startswith("pos2d ")
    nothing = on_gpu(1000)
    assert (nothing.recommended, nothing.fitting) == (None, ())
    assert "nothing fits" in plan_text(nothing).splitlines()[-2]
    assert call("plan", half_billion, "--gpu-memory", "1000").exit_code == 0
    available_memory(1e12)
    assert on_gpu(1000).recommended == "onnx int8", "which runs on the CPU"


def test_an_artifact_has_the_bytes_of_its_files(
    qwen2: Golden, artifact_of: Callable[[Golden, str], Path], call: Call
) -> None:
    for kind in ("merged", "onnx"):
        directory = artifact_of(qwen2, kind)
        report = exporter.plan(directory, branches=4)
        files = sum(path.stat().st_size for path in directory.iterdir() if path.name != "manifest.json")
        assert report.candidates[0].disk == files
        assert report.candidates[0].commands == (
            f"pos2d run {directory} --prompt YOUR_PROMPT" + (" --device cpu" if kind == "merged" else ""),
        )
        said = call("plan", directory, "--branches", 4)
        assert said.exit_code == 0
        assert "this artifact" in said.stdout
        assert json.loads(call("plan", directory, "--json").stdout)["candidates"][0]["disk"] == files


def test_the_context_is_limited_by_the_model() -> None:
    report = exporter.plan(BASE, context=10**9)
    assert report.context == AutoConfig.from_pretrained(BASE).max_position_embeddings
    assert report == replace(exporter.plan(BASE, context=report.context), memory_available=report.memory_available)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--gpu-memory", "lots"], 2, "--gpu-memory 'lots'"),
        (["--branches", "0"], 2, "--branches 0"),
        (["--context", "-3"], 2, "--context -3"),
    ],
)
def test_refusals(call: Call, flags: list[str], code: int, words: str) -> None:
    result = call("plan", BASE, *flags)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr


def test_an_unknown_keyword_names_the_nearest_parameter() -> None:
    with pytest.raises(TypeError, match="did you mean 'gpu_memory'"):
        exporter.plan(BASE, gpu_memry="8GB")  # type: ignore[call-arg]


def test_paths_that_are_no_model(
    call: Call, tmp_path: Path, qwen2: Golden, artifact_of: Callable[[Golden, str], Path]
) -> None:
    assert call("plan", tmp_path / "nowhere").exit_code == 3
    assert call("plan", tmp_path).exit_code == 3
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in artifact_of(qwen2, "onnx").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    manifest = read_manifest(broken)
    block = manifest.to_dict()
    block["graph"]["sizes"] = {"layers": 2}
    (broken / "manifest.json").write_text(json.dumps(block), encoding="utf-8")
    with pytest.raises(InputError, match=r"sizes: keys .* are missing"):
        exporter.plan(broken)


def test_a_plan_needs_no_torch(qwen2: Golden, artifact_of: Callable[[Golden, str], Path]) -> None:
    program = (
        "import sys, exporter; [exporter.plan(path) for path in sys.argv[1:]]; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnxruntime')))"
    )
    paths = [str(BASE), *(str(artifact_of(qwen2, kind)) for kind in ("merged", "onnx"))]
    subprocess.run([sys.executable, "-c", program, *paths], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", ["merged", "onnx"])
def test_a_model_that_does_not_fit_in_memory(
    kind: str,
    qwen2: Golden,
    artifact_of: Callable[[Golden, str], Path],
    available_memory: Callable[[float], None],
    call: Call,
) -> None:
    directory = artifact_of(qwen2, kind)
    available_memory(-1e12)
    with pytest.raises(StorageError, match=r"needs .* of memory, .* are available; .*pos2d plan"):
        runtime.load(directory, device="cpu")
    assert call("run", directory, "--prompt", "x", "--device", "cpu").exit_code == 5
    with pytest.raises(StorageError, match="are available"):
        runtime.load(directory, device="cpu", dtype="float32")
    available_memory(1e12)
    assert runtime.load(directory, device="cpu").manifest.kind == kind


def test_a_model_that_needs_all_available_memory_fits() -> None:
    check_memory_fits("x", 5, 5)
    with pytest.raises(StorageError, match="x needs 6 B of memory, 5 B are available"):
        check_memory_fits("x", 6, 5)


def test_only_merged_weights_are_converted() -> None:
    floor = {kind: least_memory(kind, 0, "float32", "float32") for kind in ("merged", "bnb", "onnx")}
    assert least_memory("merged", 100, "bfloat16", "float32") == floor["merged"] + 200
    assert least_memory("bnb", 100, "bfloat16", "float32") == floor["bnb"] + 100
    assert least_memory("merged", 100, "float32", "bfloat16", "8bit") == floor["merged"] + 25
    assert least_memory("merged", 100, "bfloat16", "bfloat16", "nf4") == floor["merged"] + 25
