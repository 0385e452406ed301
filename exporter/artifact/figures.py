"""The results of the check at the end of an export, in words."""

from collections.abc import Mapping
from typing import Any

from pos2d.reference import COLUMNS, ONE_BRANCH


def parity_text(parity: Mapping[str, Any]) -> str:
    """The distance to the exact model, or to the model that was exported; or how many tensors were read back."""
    if "tensors" in parity:
        return f"{parity['tensors']} tensors read back and compared"
    exact = parity.get("exact")
    if exact is not None:
        return _distance(exact)
    return (
        f"logits within {parity['max_rel_diff']:.1e} of the largest one of the model that was exported, "
        f"top token agrees on {parity['top1_agreement']:.1%}"
    )


def _distance(exact: Mapping[str, Any]) -> str:
    """The distance to the exact model in one sequence of each kind; the batch repeats both."""
    cases = [case for case in exact["cases"] if case["name"] in (ONE_BRANCH, COLUMNS)]
    weights = sum(case["positions"] for case in cases)
    top1, kl = (
        sum(case[name] * case["positions"] for case in cases) / weights for name in ("top1_agreement", "mean_kl")
    )
    tokens = "held-out text" if exact["is_text"] else "held-out random tokens"
    return f"on {tokens}, the exact model's top token on {top1:.1%}, mean KL {kl:.1e}"
