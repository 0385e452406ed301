"""Rounding of exact float64 sums to the stored type, in one step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

RoundingMode = Literal["nearest", "stochastic"]


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding to the nearest value, or stochastic rounding.

    The random numbers depend on ``seed`` and the tensor's name only, and so not on the shards.
    """

    mode: RoundingMode = "nearest"
    seed: int = 0

    def of(self, name: str) -> "Callable[[torch.Tensor, torch.dtype], torch.Tensor]":
        """The function that rounds the rows of one tensor; it must be called on blocks of rows in their order."""
        if self.mode == "nearest":
            return round_nearest
        import torch

        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        return partial(round_stochastic, generator=generator)

    def to_dict(self) -> dict[str, Any]:
        return {"mode": self.mode} | ({"seed": self.seed} if self.mode == "stochastic" else {})


def round_nearest(exact: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The value of ``dtype`` nearest to each float64 value, ties to even; values that are too large become infinite.

    torch converts to 16 bits by way of float32. These two roundings differ from a single one where the float32 value is
    half-way between two 16-bit values, so such values are rounded again, from float64.
    """
    import numpy as np
    import torch

    if dtype == torch.float64:
        return exact
    exact = exact.contiguous()  # indexed flat below, and a conversion keeps the strides
    single = exact.to(torch.float32)
    rounded = single.to(dtype)
    if dtype != torch.float32:
        # Half-way points, also those between subnormal values, end in at least these zero bits.
        zeros = {torch.bfloat16: 0x7FFF, torch.float16: 0xFFF}[dtype]
        candidates = torch.from_numpy(np.flatnonzero(single.view(torch.int32).numpy() & zeros == 0))
        rounded.view(-1)[candidates] = _round_to_odd(exact.view(-1)[candidates]).to(dtype)
    return rounded


def _round_to_odd(exact: "torch.Tensor") -> "torch.Tensor":
    """Float64 to float32 by rounding to odd: towards zero, with the last bit set where that is inexact.

    Rounding the result to fewer bits gives the same as rounding once (Boldo and Melquiond, "When double rounding is
    odd", 2005).
    """
    import torch

    near = exact.to(torch.float32)
    towards_zero = near.view(torch.int32) - (near.double().abs() > exact.abs()).int()
    odd = towards_zero | (near.double() != exact).int()
    return torch.where(near.isfinite(), odd.view(torch.float32), near)


def round_stochastic(exact: "torch.Tensor", dtype: "torch.dtype", generator: "torch.Generator") -> "torch.Tensor":
    """One of the two values of ``dtype`` around each float64 value, with the probabilities that make the mean exact."""
    import torch

    near = round_nearest(exact, dtype)
    if dtype == torch.float64:
        return near
    bits = {2: torch.int16, 4: torch.int32}[near.element_size()]
    # Floats are sign and magnitude: the bit pattern minus 1 is the next value towards zero, plus 1 the next one away.
    inner = near.view(bits) - (near.double().abs() > exact.abs()).to(bits)
    outer = inner + 1
    low, high = inner.view(dtype).double().abs(), outer.view(dtype).double().abs()
    probability = (exact.abs() - low) / (high - low)
    uniform = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    rounded = torch.where(uniform < probability, outer, inner).view(dtype)
    return torch.where(near.isfinite(), rounded, near)


def is_finite(values: "torch.Tensor") -> bool:
    """Whether a float tensor has neither NaN nor infinity, by its bits: several times as fast as ``isfinite``."""
    import torch

    size = 8 * values.element_size()
    integers = getattr(torch, f"int{size}")
    signed = values.reshape(-1).view(integers).numpy()
    unsigned = signed.view(f"uint{size}")
    # An exponent of all ones makes the largest integers: signed ones for positive values, unsigned for negative ones.
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(integers))
    return bool(signed.max(initial=0) < infinity and unsigned.max(initial=0) < infinity | 1 << (size - 1))
