"""Which of the formats that fit is the best, and why."""

from collections.abc import Mapping, Sequence

from pos2d.bnb_format import BnbQuant
from pos2d.exporter.planning.candidates import Candidate
from pos2d.manifest import Kind
from pos2d.recipes import GraphQuant

Ranking = Mapping[tuple[Kind, BnbQuant | GraphQuant | None], str]

# Best format first, with the reason. A GPU is as fast in 16 bits as in fewer, so only quality and size count there. On
# the CPU graphs are faster than torch, and quantised graphs faster than float ones; formats that lose little quality
# come first, which puts torch's 8 bits before the graphs' 4.
ON_GPU: Ranking = {
    ("merged", None): "16 bits lose least, and they fit",
    ("bnb", "8bit"): "16 bits do not fit; 8 lose less than 4",
    ("bnb", "nf4"): "nothing larger fits on the GPU",
    ("onnx", "int8"): "nothing fits on the GPU; this runs on the CPU",
    ("onnx", "int4"): "nothing fits on the GPU; this runs on the CPU, and 4 bits lose much in small models",
}
ON_CPU: Ranking = {
    ("onnx", "int8"): "the fastest on the CPU that loses little, and it fits",
    ("bnb", "8bit"): "the int8 graph does not fit; this is slower, but 8 bits lose less than 4",
    ("onnx", "int4"): "8 bits do not fit; 4 lose much in small models",
    ("bnb", "nf4"): "nothing else fits; 4 bits lose much in small models",
}
NOTHING_FITS = "nothing fits; free memory, or plan for a shorter context or fewer branches"


def recommend(
    candidates: Sequence[Candidate], fitting: Sequence[Candidate], *, on_gpu: bool
) -> tuple[Candidate | None, str]:
    """The best of the ``candidates`` that are ``fitting``, and the reason; None and the reason if none will do."""
    if len(candidates) == len(fitting) == 1:
        return fitting[0], "it fits"  # an artifact that nothing else can be made of
    for ranked, reason in (ON_GPU if on_gpu else ON_CPU).items():
        for candidate in fitting:
            form = candidate.form
            # A stock checkpoint runs as a merge does, and one that is quantised as one of bitsandbytes.
            kind = form.kind if form.kind != "stock" else "merged" if form.quant is None else "bnb"
            if (kind, form.quant) == ranked and (kind != "merged" or form.item_bytes == 2):
                return candidate, reason
    return None, NOTHING_FITS
