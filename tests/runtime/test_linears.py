"""The int8 kernels: one leaves activations as they are, the other quantises them too."""

import torch

from pos2d.bnb_format import INT8_STEPS, quantise_rows
from pos2d.runtime.backends.torch.linears import Int8Linear, bnb_int8_linear


def widened(steps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return steps.float() * (scales / INT8_STEPS)[:, None]


def test_the_kernels_compute_what_their_names_say() -> None:
    draw = torch.Generator().manual_seed(0)
    # Below the threshold above which no activation is quantised, and of bitsandbytes' own type, which it casts to.
    x = torch.randn(64, 256, generator=draw).clamp(-5, 5).half().float()
    steps, scales = quantise_rows(torch.randn(32, 256, generator=draw) * 0.1)
    quantised = widened(*quantise_rows(x))
    with torch.inference_mode():
        for kernel, expected, other in ((Int8Linear, x, quantised), (bnb_int8_linear, quantised, x)):
            found = kernel(steps.clone(), scales.clone(), None).eval()(x)
            right, wrong = ((found - given @ widened(steps, scales).T).norm() for given in (expected, other))
            assert right < 0.1 * wrong
