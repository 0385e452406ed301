"""The pages for people who move over say everything that the trainer's inference guide offers."""

import re
from pathlib import Path
from typing import Any

import click
import pytest

from pos2d.commands.main import command_of
from pos2d.runtime.engine.sampling import PRESETS

DOCS = Path(__file__).resolve().parents[2] / "docs"
MOVING = (DOCS / "moving-over.md").read_text(encoding="utf-8")
SAMPLING = (DOCS / "sampling.md").read_text(encoding="utf-8")
OLD_FLAGS = (
    *("--base_model", "--lora_path", "--lora_rank", "--rope_2d_ratio", "--no_patch_rope", "--device", "--dtype"),
    *("--mode", "--prompt", "--max_new_tokens", "--temperature", "--top_p", "--top_k", "--repetition_penalty"),
)
# Ranges of the guide: temperature, top_p, top_k, repetition_penalty.
RECOMMENDED: dict[str, tuple[tuple[float, float], ...]] = {
    "factual": ((0.1, 0.3), (0.7, 0.8), (20, 30), (1.1, 1.1)),
    "creative": ((0.7, 0.9), (0.9, 0.95), (50, 100), (1.0, 1.0)),
    "code": ((0.1, 0.2), (0.8, 0.8), (30, 30), (1.1, 1.1)),
    "chat": ((0.6, 0.8), (0.9, 0.9), (50, 50), (1.1, 1.1)),
    "translate": ((0.1, 0.1), (0.8, 0.8), (20, 20), (1.0, 1.0)),
}


@pytest.mark.parametrize("flag", OLD_FLAGS)
def test_every_flag_of_the_script_is_explained_and_accepted(flag: str) -> None:
    assert f"`{flag}" in MOVING or f" {flag}" in MOVING
    accepted = {
        option
        for name in ("merge", "run")
        for parameter in command_of(name).params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    assert flag.replace("_", "-") in accepted


def test_presets_are_what_the_guide_recommends_and_what_the_page_says() -> None:
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    rows: dict[str, Any] = {
        cells[0]: cells[1:]
        for line in SAMPLING.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in PRESETS
    }
    assert set(rows) == set(PRESETS) == set(RECOMMENDED)
    for preset, ranges in RECOMMENDED.items():
        values = [PRESETS[preset][name] for name in names]  # type: ignore[index]
        assert [str(value) for value in values] == rows[preset]
        assert all(low <= value <= high for value, (low, high) in zip(values, ranges, strict=True))


def test_the_six_questions_have_answers() -> None:
    section = MOVING.partition("## The six questions")[2]
    assert len(re.findall(r"^\*\*", section, flags=re.MULTILINE)) == 6


def test_every_sampling_flag_is_on_the_page() -> None:
    from pos2d.options import options_of
    from pos2d.runtime.engine.sampling import SamplingOptions

    for name in options_of(SamplingOptions):
        assert f"`--{name.replace('_', '-')}`" in SAMPLING or name == "preset"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"docs/{page.name}" in readme
