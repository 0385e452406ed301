"""The positions that are tried: no 2D RoPE, every usual ratio, and the usual strides of those that are promising."""

from pos2d.spec import Rope2DSpec, pair_indices_for_ratio

# The most usual first, in the order in which they are tried. Of several ratios that select the same frequencies the
# first one is named.
RATIOS = (0.5, 1.0, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875)
STRIDES = (128, 64, 256, 512, 1)
# The trainer's default; that of the ratio is in pos2d.sources.source.
DEFAULT_STRIDE = STRIDES[0]


def ratios_with(frequencies: int, stride: int) -> list[Rope2DSpec]:
    """Every ratio with one stride, the most usual ratio first."""
    ratios = sorted(distinct_ratios(frequencies), key=RATIOS.index)
    return [Rope2DSpec(frequencies, pair_indices_for_ratio(frequencies, ratio), stride) for ratio in ratios]


def strides_of(spec: Rope2DSpec) -> list[Rope2DSpec]:
    """The ratio of ``spec`` with every stride, the most usual stride first."""
    return [Rope2DSpec(spec.num_frequencies, spec.pair_indices, stride) for stride in STRIDES]


def distinct_ratios(frequencies: int) -> dict[float, int]:
    """The ratios that select different numbers of frequencies, each with its number, ascending."""
    ratio_of_count: dict[int, float] = {}
    for ratio in RATIOS:
        ratio_of_count.setdefault(len(pair_indices_for_ratio(frequencies, ratio)), ratio)
    return {ratio_of_count[count]: count for count in sorted(ratio_of_count)}
