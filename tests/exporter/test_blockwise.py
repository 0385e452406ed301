"""Block-wise quantisation to 4 and 8 bits: the stored values, and that ONNX Runtime computes with the same ones."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pos2d.exporter.quantisation.blockwise import CHUNK_ELEMENTS, SEARCHED_SPANS, dequantise, quantise
from tests.bounds import gamma, sum_bound

BITS = (4, 8)
Tensor = torch.Tensor


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Pseudo-random values whose tails are heavier than those of a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def stored(values: Tensor, bits: int, block_size: int, spans: tuple[float, ...] = ()) -> Tensor:
    return dequantise(*quantise(values, bits, block_size, spans), bits, values.shape[1])


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """Values as ``[rows, blocks, block_size]``, with the last block padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % block_size))
    return padded.reshape(len(values), -1, block_size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "block_size"), [(64, 16), (96, 32), (100, 32), (7, 16), (300, 128)])
def test_shapes_and_padding(bits: int, columns: int, block_size: int) -> None:
    packed, scales = quantise(heavy_tailed(5, columns), bits, block_size)
    blocks = -(-columns // block_size)
    assert (packed.shape, packed.dtype) == ((5, blocks, block_size * bits // 8), torch.uint8)
    assert (scales.shape, scales.dtype) == ((5, blocks), torch.float32)
    assert dequantise(packed, scales, bits, columns).shape == (5, columns)
    padding = dequantise(packed, scales, bits, blocks * block_size)[:, columns:]
    assert not padding.any()


@pytest.mark.parametrize("bits", BITS)
def test_errors_are_at_most_half_a_step_within_the_range(bits: int) -> None:
    values = heavy_tailed(64, 200)
    packed, scales = quantise(values, bits, 32, SEARCHED_SPANS[bits])
    step = scales.abs().repeat_interleave(32, dim=1)[:, :200]
    error = (dequantise(packed, scales, bits, 200) - values).abs()
    limit = (2 ** (bits - 1) - 1) * step
    beyond = (values.abs() - limit).clamp_min(0)
    # Three roundings lead to an integer, one back, and this test adds its own.
    rounding = gamma(6, torch.float32) * (values.abs() + step)
    assert (error <= beyond + step / 2 + rounding).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_the_search_never_does_worse_than_rounding_to_nearest(bits: int, block_size: int) -> None:
    values = heavy_tailed(64, 320)
    half = 2 ** (bits - 1)
    scale = in_blocks(values, block_size).abs().amax(-1, keepdim=True) / (half - 1)
    symmetric = ((in_blocks(values, block_size) / scale).round() * scale).flatten(1)[:, :320]

    def errors(other: Tensor) -> Tensor:
        return in_blocks(other - values, block_size).double().square().sum(-1)

    searched = errors(stored(values, bits, block_size, SEARCHED_SPANS[bits]))
    square = in_blocks(values, block_size).double().square().sum(-1)
    for rounded in (stored(values, bits, block_size, spans=(float(half),)), symmetric):
        least = errors(rounded)
        # The search compares two float32 sums of squares and products whose values are a few roundings off.
        sums, terms = gamma(block_size + 4, torch.float32) * least, gamma(4, torch.float32) * (least * square).sqrt()
        assert (searched <= least + 8 * (sums + terms)).all()
        assert searched.sum() < least.sum()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_magnitude_is_the_lowest_step_whatever_its_sign(bits: int) -> None:
    half = 2 ** (bits - 1)
    values = torch.linspace(-0.5, 0.5, 16).repeat(2, 1)
    values[:, 3] = torch.tensor([2.0, -2.0])
    packed, scales = quantise(values, bits, 16, spans=(float(half),))
    assert scales.flatten().tolist() == [-2.0 / half, 2.0 / half]
    assert torch.equal(dequantise(packed, scales, bits, 16)[:, 3], values[:, 3])
    assert torch.equal(stored(-values, bits, 16), -stored(values, bits, 16))


@pytest.mark.parametrize("bits", BITS)
def test_constant_blocks_are_stored_exactly(bits: int) -> None:
    values = torch.tensor([0.0, 3.0, -0.1, 1e-30, 1e-42, 3e38]).repeat_interleave(32).reshape(2, 96)
    # A quotient, a scale and a product are rounded; below the normal range each is off by half of the smallest step.
    rtol, atol = gamma(3, torch.float32), (2 ** (bits - 1) + 1) * 2.0**-150
    torch.testing.assert_close(stored(values, bits, 32), values, rtol=rtol, atol=atol)


@pytest.mark.parametrize("bits", BITS)
def test_a_block_does_not_depend_on_the_others(bits: int) -> None:
    """Nor on where the matrix is split into chunks."""
    values = heavy_tailed(CHUNK_ELEMENTS // 256 + 3, 256)
    last_rows = stored(values[-5:], bits, 64)
    among_others = stored(values, bits, 64)[-5:]
    # The 8-bit search compares sums whose order depends on the place, and a value may lie halfway between two steps.
    close = torch.isclose(among_others, last_rows, rtol=4 * gamma(64 + 4, torch.float32) if bits == 8 else 0.0, atol=0)
    assert close.float().mean() > (0.99 if bits == 8 else 0.9999)
    values[:-5] *= 100
    assert torch.equal(stored(values, bits, 64)[-5:], among_others)
    assert torch.equal(stored(values.T, bits, 64), stored(values.T.contiguous(), bits, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "block_size"), [(64, 16), (192, 32), (200, 32), (200, 64), (256, 128)])
@pytest.mark.parametrize("count", [1, 7])
def test_onnx_runtime_computes_with_the_same_values(bits: int, columns: int, block_size: int, count: int) -> None:
    values, inputs = heavy_tailed(33, columns), torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
    packed, scales = quantise(values, bits, block_size)
    assert (scales < 0).any()
    weight = dequantise(packed, scales, bits, columns).double()
    expected, magnitude = inputs.double() @ weight.T, inputs.double().abs() @ weight.abs().T
    output = onnx_product(inputs, packed, scales, bits, block_size, accuracy=0)
    # The sum has one rounding per column, and the scale may be applied before or after it.
    assert ((output - expected).abs() <= sum_bound(columns + 2, torch.float32, magnitude)).all()
    # Accuracy level 4 quantises the inputs to 8 bits as well, block by block, which changes products by about 1 %.
    output = onnx_product(inputs, packed, scales, bits, block_size, accuracy=4)
    assert (output - expected).norm() < 0.03 * expected.norm()


def onnx_product(inputs: Tensor, packed: Tensor, scales: Tensor, bits: int, block_size: int, accuracy: int) -> Tensor:
    rows, columns = len(packed), inputs.shape[1]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["count", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["count", rows])],
        [numpy_helper.from_array(packed.numpy(), "packed"), numpy_helper.from_array(scales.numpy(), "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = session.run(None, {"x": inputs.numpy()})[0]
    return torch.from_numpy(output)
