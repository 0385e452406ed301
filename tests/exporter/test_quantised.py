"""Quantised checkpoints: the exact sum within half a step is written, and what was written is computed with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pos2d import exporter, runtime
from pos2d.bnb_format import quantise_rows
from pos2d.errors import InputError
from pos2d.runtime.backends.torch.linears import Int8Linear, quantised_linear
from tests.bases import CONFIGS, linear_modules, random_adapter, weights, write_adapter, write_base
from tests.bounds import SIGMAS, gamma, in_turn, logits_bound, sum_bound
from tests.conftest import Golden
from tests.runtime.test_transformers_loading import VERSIONS, in_transformers

ArtifactOf = Callable[[Golden, str], Path]
ModelOf = Callable[..., runtime.Model]

INT8_PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
)
layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "Linear8bitLt"}
save_file({f"{name}.weight": layer.weight.data for name, layer in layers.items()}, sys.argv[2])
print(json.dumps({"version": transformers.__version__}))
"""

RELOAD_PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

options = {"dtype": torch.float32, "attn_implementation": sys.argv[4]}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options)
golden = load_file(sys.argv[2] + "/golden.safetensors")
# In inference its nf4 rounds activations to bfloat16 where the CPU has instructions for it, in training nowhere.
model.train(model.config.quantization_config.load_in_4bit)
found = {}
with torch.no_grad():
    for layout in ("single", "multi"):
        keys = [key for key in ("input_ids", "position_ids", "pos2d") if f"{layout}.{key}" in golden]
        given = {key: golden[f"{layout}.{key}"] for key in keys}
        if given:
            found[layout] = model(**given).logits
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(golden["single.input_ids"], **options)
save_file(found, sys.argv[3])
kinds = sorted({type(layer).__name__ for layer in model.modules() if "Linear" in type(layer).__name__})
assert not {"pos2d", "exporter", "runtime"} & set(sys.modules)
print(json.dumps({"version": transformers.__version__, "kinds": kinds, "generated": made[0].tolist()}))
"""


def quantised(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Int8 weights and scales by the weight's name."""
    tensors = weights(directory)
    names = (name for name in tensors if name.endswith(".SCB"))
    return {(w := name.replace(".SCB", ".weight")): (tensors[w], tensors[name]) for name in names}


@pytest.fixture
def float32(golden: Golden, tmp_path: Path) -> Path:
    exporter.merge(output=tmp_path / "float32", dtype="float32", **golden.flags)
    return tmp_path / "float32"


def test_every_value_is_within_half_a_step_of_the_sum(golden: Golden, float32: Path, artifact_of: ArtifactOf) -> None:
    exact, found = weights(float32), quantised(artifact_of(golden, "8bit"))
    assert set(found) == {name for name in exact if name.endswith("_proj.weight")}
    for name, (steps, scales) in found.items():
        # Both are a float64 sum that was rounded to float32.
        torch.testing.assert_close(scales, exact[name].abs().amax(1), rtol=gamma(2, torch.float32), atol=0)
        width = scales.double()[:, None] / 127
        error = (steps.double() * width - exact[name].double()).abs()
        rounding = in_turn(gamma(1, torch.float32), gamma(8, torch.float64)) * exact[name].double().abs()
        assert (error <= 0.5 * width + rounding).all(), name


def test_the_rest_is_as_a_merge_has_it(golden: Golden, artifact_of: ArtifactOf) -> None:
    merged, found = weights(artifact_of(golden, "merged")), weights(artifact_of(golden, "8bit"))
    rest = [name for name in merged if not name.endswith("_proj.weight")]
    assert all(torch.equal(merged[name], found[name]) for name in rest)
    formats = {name: tensor for name, tensor in found.items() if name.endswith(".weight_format")}
    assert formats
    assert all(tensor.dtype == torch.uint8 and tensor.shape == () and tensor == 0 for tensor in formats.values())


def test_transformers_quantises_the_merge_to_the_same_steps(
    golden: Golden, float32: Path, artifact_of: ArtifactOf, tmp_path: Path
) -> None:
    """It goes through float16, so that a value close to the middle of two steps may fall to the other side."""
    in_transformers("newest", INT8_PROGRAM, tmp_path, float32, tmp_path / "theirs.safetensors")
    theirs, ours = load_file(tmp_path / "theirs.safetensors"), quantised(artifact_of(golden, "8bit"))
    assert set(theirs) == set(ours)
    apart = torch.cat([(theirs[name].int() - ours[name][0].int()).abs().flatten() for name in ours])
    assert apart.max() <= 1
    # Value and scale are rounded: a middle is crossed as often as both together move a value, in steps.
    moved = gamma(2, torch.float16) * torch.cat([steps.double().abs().flatten() for steps, _ in ours.values()])
    assert (apart != 0).double().mean() <= moved.mean()


def test_a_layer_is_within_the_rounding_of_its_rows(
    golden: Golden, float32: Path, artifact_of: ArtifactOf, model_of: ModelOf
) -> None:
    """|y_q - y| <= sum_j |x_j| * half a step of the row, for the activations that the golden sequences really have."""
    reference: Any = runtime.load(float32, device="cpu").backend
    ours: Any = model_of(golden, "8bit", device="cpu", dtype="float32").backend
    checked = []

    def compare(name: str) -> Callable[..., None]:
        layer = ours._model.get_submodule(name)
        assert isinstance(layer, Int8Linear)

        def hook(_: nn.Module, given: tuple[torch.Tensor], expected: torch.Tensor) -> None:
            found = layer(given[0])
            bound = given[0].abs().sum(-1, keepdim=True) * layer.steps / 2
            bias = 0.0 if layer.bias is None else layer.bias.abs()
            magnitude = given[0].abs() @ (layer.weight.abs() * layer.steps[:, None]).T + bias + bound
            # Both are float32 sums; ours has the steps, their product and the bias in it.
            slack = sum_bound(2 * (given[0].shape[-1] + 3), torch.float32, magnitude)
            assert ((found - expected).abs() <= bound + slack).all(), name
            checked.append(name)

        return hook

    names = [name for name, layer in reference._model.named_modules() if name.endswith("_proj")]
    for name in names:
        reference._model.get_submodule(name).register_forward_hook(compare(name))
    layout = "multi" if "multi.input_ids" in golden.tensors else "single"
    keys = ("input_ids", "position_ids", "pos2d")
    given = [golden.tensors[f"{layout}.{key}"] for key in keys if f"{layout}.{key}" in golden.tensors]
    model = runtime.Model(float32, model_of(golden, "8bit").manifest, reference)
    model.logits(*given)
    assert checked == names


@pytest.mark.parametrize("quant", ["8bit", "nf4"])
def test_the_runtime_computes_what_the_file_says(
    golden: Golden, quant: str, float32: Path, artifact_of: ArtifactOf, model_of: ModelOf
) -> None:
    """The float model with its weights replaced by the stored ones gives the same logits."""
    reference: Any = runtime.load(float32, device="cpu")
    ours = model_of(golden, quant, device="cpu", dtype="float32")
    scales = (".SCB", ".weight.absmax")
    tensors = weights(artifact_of(golden, quant))
    stored = {f"{name.removesuffix(end)}.weight" for name in tensors for end in scales if name.endswith(end)}
    assert stored
    with torch.no_grad():
        for name, parameter in reference.backend._model.named_parameters():
            if name in stored:
                parameter.copy_(dequantised(artifact_of(golden, quant), name))
    for layout in ("single", "multi"):
        if f"{layout}.input_ids" not in golden.tensors:
            continue
        keys = (f"{layout}.{key}" for key in ("input_ids", "position_ids", "pos2d"))
        given = [golden.tensors[key] for key in keys if key in golden.tensors]
        expected = reference.logits(*given)
        np.testing.assert_allclose(ours.logits(*given), expected, rtol=0, atol=logits_bound(expected))


def dequantised(directory: Path, name: str) -> torch.Tensor:
    """By hand from the file; nf4 with bitsandbytes' documented code: two values a byte, the first in the high half."""
    tensors = weights(directory)
    if name.replace("weight", "SCB") in tensors:
        return tensors[name].float() * (tensors[name.replace("weight", "SCB")] / 127)[:, None]
    note = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    packed = tensors[name].flatten().int()
    values = tensors[f"{name}.quant_map"][torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    scales = tensors[f"{name}.absmax"].repeat_interleave(note["blocksize"])
    return (values * scales[: len(values)]).reshape(note["shape"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quant", ["8bit", "nf4"])
def test_plain_transformers_loads_it(
    golden: Golden, quant: str, version: str, artifact_of: ArtifactOf, model_of: ModelOf, tmp_path: Path
) -> None:
    """The artifact's own files, both generations, and the same logits as ours on bitsandbytes' kernels."""
    saved = tmp_path / "logits.safetensors"
    # In 8 bits activations are rounded too, and one that lies halfway moves logits by more than 1e-2. Eager attention
    # has the same products in both programs, so that they round the same values.
    attention = "eager" if quant == "8bit" else "sdpa"
    arguments = (artifact_of(golden, quant), golden.path, saved, attention)
    report = in_transformers(version, RELOAD_PROGRAM, tmp_path, *arguments)
    assert report["kinds"] == ["Linear", "Linear8bitLt" if quant == "8bit" else "Linear4bit"]
    kernel = "bnb" if quant == "8bit" else "auto"
    flags = {"int8_kernel": kernel, "attn_implementation": attention}
    ours = model_of(golden, quant, device="cpu", dtype="float32", **flags)
    for layout, theirs in load_file(saved).items():
        keys = (f"{layout}.{key}" for key in ("input_ids", "position_ids", "pos2d"))
        found = ours.logits(*(golden.tensors[key] for key in keys if key in golden.tensors))
        np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=logits_bound(found))


def test_quantising_while_loading_is_like_the_export(golden: Golden, float32: Path, artifact_of: ArtifactOf) -> None:
    loaded: Any = runtime.load(float32, device="cpu", quant="8bit").backend
    for name, (steps, _) in quantised(artifact_of(golden, "8bit")).items():
        found = loaded._model.get_parameter(name)
        assert found.dtype == torch.int8
        apart = (found.int() - steps.int()).abs()
        assert apart.max() <= 1
        # Float32 moves a value by a hundred-thousandth of a step, so that a middle is hardly ever crossed.
        assert (apart == 0).double().mean() > 0.999


def test_from_a_float32_merge_it_is_nearly_the_same(
    golden: Golden, float32: Path, artifact_of: ArtifactOf, tmp_path: Path
) -> None:
    report = exporter.export(float32, tmp_path / "out", format="bnb", quant="8bit")
    assert report.quantised is not None
    assert report.quantised.retention is None  # there is nothing to hold the sum against
    for name, (steps, scales) in quantised(artifact_of(golden, "8bit")).items():
        theirs, their_scales = quantised(tmp_path / "out")[name]
        torch.testing.assert_close(scales, their_scales, rtol=gamma(2, torch.float32), atol=0)
        assert ((steps.int() - theirs.int()).abs() <= 1).all()


def test_the_exact_sum_keeps_what_a_half_swallows(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    save_file({name: tensor.bfloat16() for name, tensor in weights(base).items()}, base / "model.safetensors")
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base), seed=3))
    small = f"{lora}=0.005"
    merged = exporter.merge(base, small, tmp_path / "merged")
    assert merged.totals is not None
    assert merged.totals.retention is not None
    assert merged.totals.retention < 0.5
    named: dict[str, Any] = {"base_model": base, "lora": small, "rope_2d_ratio": 0.5}
    direct = exporter.export(None, tmp_path / "direct", format="bnb", quant="8bit", **named)
    assert direct.quantised is not None
    assert direct.quantised.retention is not None
    assert merged.totals.delta_ratio is not None
    values = sum(rows * columns for rows, columns in linear_modules(base).values())
    # Unbiased: what rounding adds to each value is independent of the change.
    error = direct.quantised.noise / merged.totals.delta_ratio / values**0.5
    assert abs(direct.quantised.retention - 1) < SIGMAS * error
    assert not direct.warnings
    late = exporter.export(tmp_path / "merged", tmp_path / "late", format="bnb", quant="8bit")
    assert "quantises the exact sum" in late.warnings[0]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_nf4_in_float32_is_exact_whatever_was_quantised(stored: torch.dtype, rows: int) -> None:
    """bitsandbytes would round the dequantised weights to the type that they had before."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 128) * 0.02).to(stored)
    layer: Any = quantised_linear({"weight": weight}, "nf4", "auto", torch.float32)
    state, packed = layer.weight.quant_state, layer.weight.data.flatten().int()
    values = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    exact = (values * state.absmax.repeat_interleave(state.blocksize)).reshape(weight.shape).double()
    x = torch.randn(rows, 128)
    magnitude = x.double().abs() @ exact.abs().T
    assert ((layer(x).double() - x.double() @ exact.T).abs() <= sum_bound(129, torch.float32, magnitude)).all()


def test_a_row_of_zeros_stays_zero() -> None:
    steps, scales = quantise_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=torch.float64))
    assert steps.tolist() == [[0, 0], [64, -127]]
    assert scales.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("inputs", [1, 7, 50, 63, 64, 72, 576])
def test_every_product_is_the_exact_one(inputs: int) -> None:
    """Packed and widened, in both halves, with activations that would overflow float16 as sums of whole steps."""
    torch.manual_seed(0)
    steps, scales = quantise_rows(torch.randn(96, inputs) * 0.02)
    layer = Int8Linear(steps, scales, torch.randn(96).bfloat16())
    x = torch.randn(40, inputs).bfloat16()
    x[:, 0] = 2000
    assert layer.bias is not None
    weight, bias = steps.double() * scales.double()[:, None] / 127, layer.bias.double()
    exact, magnitude = x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T + bias.abs()
    found = [layer(x), torch.cat([layer(part) for part in torch.chunk(x, 5)]), layer(x.half()), layer(x.float())]
    # Sums are in float32, with a rounding each of steps, product and bias; bfloat16 instructions of ARM round to odd,
    # which is twice as far. Bfloat16 rounds sum, steps, product and bias once more, float16 weight and sum.
    sums = [gamma(count, torch.float32) for count in (2 * inputs + 3, 2 * inputs + 3, inputs + 3, inputs + 3)]
    halves = [gamma(4, torch.bfloat16), gamma(4, torch.bfloat16), gamma(2, torch.float16), 0.0]
    for product, share, half in zip(found, sums, halves, strict=True):
        assert ((product.double() - exact).abs() <= in_turn(share, half) * magnitude).all()


def test_rows_of_tiny_values_and_of_none_that_is_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        steps, scales = quantise_rows(torch.tensor([[1e-38, -5e-39]], dtype=dtype))
        assert steps.tolist() == [[127, -64]]
        assert scales.tolist() == pytest.approx([1e-38], abs=2**-150)  # half of the least step of float32
    with pytest.raises(InputError, match="NaN or infinite"):
        quantised_linear({"weight": torch.tensor([[1.0, float("nan")]])}, "8bit", "auto", torch.float32)
