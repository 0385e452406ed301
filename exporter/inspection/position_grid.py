"""The positions that are tried: no 2D RoPE, and every usual ratio with every usual stride.

Ratio and stride are tried together, because with a wrong stride the right ratio can be worse than a wrong one.
"""

from pos2d.spec import Rope2DSpec, pair_indices_for_ratio

# Of several ratios that select the same frequencies the first one is named: rounder numbers are more probable.
RATIOS = (0.5, 1.0, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875)
STRIDES = (128, 64, 256, 512, 1)
# The trainer's default; that of the ratio is in pos2d.sources.source.
DEFAULT_STRIDE = STRIDES[0]


def position_grid(frequencies: int) -> list[Rope2DSpec]:
    """No 2D RoPE, and every ratio with every stride."""
    pairs = [pair_indices_for_ratio(frequencies, ratio) for ratio in distinct_ratios(frequencies)]
    return [Rope2DSpec(frequencies, ()), *(Rope2DSpec(frequencies, p, stride) for p in pairs for stride in STRIDES)]


def distinct_ratios(frequencies: int) -> dict[float, int]:
    """The ratios that select different numbers of frequencies, each with its number, ascending."""
    ratio_of_count: dict[int, float] = {}
    for ratio in RATIOS:
        ratio_of_count.setdefault(len(pair_indices_for_ratio(frequencies, ratio)), ratio)
    return {ratio_of_count[count]: count for count in sorted(ratio_of_count)}
