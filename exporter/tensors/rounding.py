"""From the exact float64 sum to the stored type, in one rounding."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True, slots=True)
class Rounding:
    """``nearest`` or ``stochastic``; the latter draws from ``seed`` and a tensor's name, whatever the sharding."""

    mode: str = "nearest"
    seed: int = 0

    def of(self, name: str) -> "Callable[[torch.Tensor, torch.dtype], torch.Tensor]":
        """The function for the rows of one tensor, called in their order."""
        if self.mode == "nearest":
            return round_nearest
        import torch

        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        return partial(round_stochastic, generator=generator)

    def to_dict(self) -> dict[str, Any]:
        return {"mode": self.mode} | ({"seed": self.seed} if self.mode == "stochastic" else {})


def round_nearest(exact: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The value of ``dtype`` that is nearest to each float64 value, ties to even; too large ones become infinite.

    torch goes through float32 on its way to a half, and two roundings are not one where the first ends half-way between
    two halves. Those few are rounded again.
    """
    import numpy as np
    import torch

    if dtype == torch.float64:
        return exact
    near = exact.to(torch.float32)
    rounded = near.to(dtype)
    if dtype != torch.float32:
        # Half-way points, of subnormal halves too, have at least these zeros at their end.
        zeros = {torch.bfloat16: 0x7FFF, torch.float16: 0xFFF}[dtype]
        suspects = torch.from_numpy(np.flatnonzero(near.view(torch.int32).numpy() & zeros == 0))
        rounded.view(-1)[suspects] = _to_odd(exact.view(-1)[suspects]).to(dtype)
    return rounded


def _to_odd(exact: "torch.Tensor") -> "torch.Tensor":
    """Float32 towards zero, with the last bit set where that is not exact: rounding it again is like rounding once
    (Boldo and Melquiond, "When double rounding is odd", 2005)."""
    import torch

    near = exact.to(torch.float32)
    towards_zero = near.view(torch.int32) - (near.double().abs() > exact.abs()).int()
    odd = towards_zero | (near.double() != exact).int()
    return torch.where(near.isfinite(), odd.view(torch.float32), near)


def round_stochastic(exact: "torch.Tensor", dtype: "torch.dtype", generator: "torch.Generator") -> "torch.Tensor":
    """One of the two values of ``dtype`` around each float64 value, with the odds that make the mean exact."""
    import torch

    near = round_nearest(exact, dtype)
    if dtype == torch.float64:
        return near
    bits = {2: torch.int16, 4: torch.int32}[near.element_size()]
    # Sign and magnitude: the bit pattern before is the next value towards zero, the one after it the next away.
    inner = near.view(bits) - (near.double().abs() > exact.abs()).to(bits)
    outer = inner + 1
    low, high = inner.view(dtype).double().abs(), outer.view(dtype).double().abs()
    odds = (exact.abs() - low) / (high - low)
    draws = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    rounded = torch.where(draws < odds, outer, inner).view(dtype)
    return torch.where(near.isfinite(), rounded, near)


def is_finite(values: "torch.Tensor") -> bool:
    """Whether a float tensor has neither NaN nor infinity, read from its bits: several times as fast as torch's own."""
    import torch

    size = 8 * values.element_size()
    integers = getattr(torch, f"int{size}")
    signed = values.reshape(-1).view(integers).numpy()
    unsigned = signed.view(f"uint{size}")
    # An exponent of ones makes the largest patterns of either sign: signed for the positive, unsigned for the negative.
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(integers))
    return bool(signed.max(initial=0) < infinity and unsigned.max(initial=0) < infinity | 1 << (size - 1))
