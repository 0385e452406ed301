"""Weights as blocks of 4 and 8 bits: what they stand for, and that ONNX Runtime computes with the same."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pos2d.exporter.quantisation.blockwise import PIECE, SEARCHED, dequantise, quantise

BITS = (4, 8)
Tensor = torch.Tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Values with tails heavier than a normal distribution's."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).exp()


def stored(values: Tensor, bits: int, block: int, steps: tuple[float, ...] = ()) -> Tensor:
    return dequantise(*quantise(values, bits, block, steps), bits, values.shape[1])


def in_blocks(values: Tensor, block: int) -> Tensor:
    """``[rows, blocks, block]``, with zeros where the last is not whole."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % block))
    return padded.reshape(len(values), -1, block)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "block"), [(64, 16), (96, 32), (100, 32), (7, 16), (300, 128)])
def test_a_file_has_what_it_says(bits: int, columns: int, block: int) -> None:
    packed, scales = quantise(drawn(5, columns), bits, block)
    blocks = -(-columns // block)
    assert (packed.shape, packed.dtype) == ((5, blocks, block * bits // 8), torch.uint8)
    assert (scales.shape, scales.dtype) == ((5, blocks), torch.float32)
    assert dequantise(packed, scales, bits, columns).shape == (5, columns)
    beyond = dequantise(packed, scales, bits, blocks * block)[:, columns:]
    assert not beyond.any()


@pytest.mark.parametrize("bits", BITS)
def test_a_value_within_reach_is_within_half_a_step(bits: int) -> None:
    values = drawn(64, 200)
    packed, scales = quantise(values, bits, 32, SEARCHED[bits])
    step = scales.abs().repeat_interleave(32, dim=1)[:, :200]
    error = (dequantise(packed, scales, bits, 200) - values).abs()
    reach = (2 ** (bits - 1) - 1) * step
    assert (error <= torch.where(values.abs() <= reach, step / 2, values.abs() - reach + step / 2) * 1.001).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_search_never_does_worse_than_rounding_to_nearest(bits: int, block: int) -> None:
    values = drawn(64, 320)
    half = 2 ** (bits - 1)
    largest = in_blocks(values, block).abs().amax(-1, keepdim=True) / (half - 1)
    symmetric = ((in_blocks(values, block) / largest).round() * largest).flatten(1)[:, :320]

    def errors(other: Tensor) -> Tensor:
        return in_blocks(other - values, block).double().square().sum(-1)

    searched = errors(stored(values, bits, block, SEARCHED[bits]))
    for rounded in (stored(values, bits, block, steps=(float(half),)), symmetric):
        assert (searched <= errors(rounded) * (1 + 1e-4)).all()
        assert searched.sum() < errors(rounded).sum()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_magnitude_is_at_the_far_end_whatever_its_sign(bits: int) -> None:
    half = 2 ** (bits - 1)
    values = torch.linspace(-0.5, 0.5, 16).repeat(2, 1)
    values[:, 3] = torch.tensor([2.0, -2.0])
    packed, scales = quantise(values, bits, 16, steps=(float(half),))
    assert scales.flatten().tolist() == [-2.0 / half, 2.0 / half]
    assert torch.equal(dequantise(packed, scales, bits, 16)[:, 3], values[:, 3])
    assert torch.equal(stored(-values, bits, 16), -stored(values, bits, 16))


@pytest.mark.parametrize("bits", BITS)
def test_blocks_with_one_value_keep_it(bits: int) -> None:
    values = torch.tensor([0.0, 3.0, -0.1, 1e-30, 1e-42, 3e38]).repeat_interleave(32).reshape(2, 96)
    torch.testing.assert_close(stored(values, bits, 32), values, rtol=1e-6, atol=1e-42)


@pytest.mark.parametrize("bits", BITS)
def test_a_block_does_not_depend_on_the_others(bits: int) -> None:
    """Nor on where the matrix is cut while it is computed with."""
    values = drawn(PIECE // 256 + 3, 256)
    some = stored(values[-5:], bits, 64)
    assert torch.equal(stored(values, bits, 64)[-5:], some)
    values[:-5] *= 100
    assert torch.equal(stored(values, bits, 64)[-5:], some)
    assert torch.equal(stored(values.T, bits, 64), stored(values.T.contiguous(), bits, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "block"), [(64, 16), (192, 32), (200, 32), (200, 64), (256, 128)])
@pytest.mark.parametrize("count", [1, 7])
def test_onnx_runtime_computes_with_the_same_values(bits: int, columns: int, block: int, count: int) -> None:
    values, inputs = drawn(33, columns), torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
    packed, scales = quantise(values, bits, block)
    assert (scales < 0).any()
    expected = inputs @ dequantise(packed, scales, bits, columns).T
    found = multiplied(inputs, packed, scales, bits, block, accuracy=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    # Level 4 rounds the inputs to 8 bits too, in blocks.
    rough = multiplied(inputs, packed, scales, bits, block, accuracy=4)
    assert (rough - expected).norm() < 0.03 * expected.norm()


def multiplied(inputs: Tensor, packed: Tensor, scales: Tensor, bits: int, block: int, accuracy: int) -> Tensor:
    rows, columns = len(packed), inputs.shape[1]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
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
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = session.run(None, {"x": inputs.numpy()})[0]
    return torch.from_numpy(found)
