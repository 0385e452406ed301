"""The table of formats: modules with the same functions, which share the options of an export among them."""

from inspect import signature
from typing import get_args

import pytest

from pos2d.errors import UsageError
from pos2d.exporter.formats import FORMATS, ExportFormat, format_of, load_format
from pos2d.exporter.formats.onnx.weight_layout import lay_out
from pos2d.exporter.formats.options import ExportOptions, FormatName
from pos2d.families import Dimensions, expected_tensors
from pos2d.options import options_of
from pos2d.recipes import GraphRecipe
from tests.bases import CONFIGS


def test_the_table_has_every_format_that_the_options_name() -> None:
    assert set(FORMATS) == set(get_args(FormatName))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("function", ["refuse", "plan", "write", "check"])
def test_formats_have_the_same_functions(name: FormatName, function: str) -> None:
    expected = [parameter for parameter in signature(getattr(ExportFormat, function)).parameters if parameter != "self"]
    assert list(signature(getattr(load_format(name), function)).parameters) == expected


def test_every_option_belongs_to_a_format() -> None:
    taken = {option for name in FORMATS for option in load_format(name).OPTIONS}
    assert taken | {"format"} == set(options_of(ExportOptions))


def test_all_options_of_other_formats_are_named_at_once() -> None:
    options = ExportOptions(format="bnb", quant="8bit", no_verify=True, block_size=32)
    with pytest.raises(UsageError, match=r"`block_size` and `no_verify` belong to `format='onnx'`"):
        format_of(options)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_laid_out_from_shapes_alone(family: str) -> None:
    """Every tensor is in one weight, and stored tensors do not overlap."""
    sizes = Dimensions.from_config(CONFIGS[family].to_dict(), family)
    shapes = expected_tensors(sizes)
    bits = {name.removesuffix(".weight"): 4 for name in shapes if name.endswith("_proj.weight")}
    layout = lay_out(shapes, sizes, "float32", GraphRecipe("int4", 16, bits | {"lm_head": 8}))
    assert layout.tied == sizes.tied
    assert sorted(part for weight in layout.weights.values() for part in weight.parts) == sorted(shapes)
    places = [place for weight in layout.weights.values() for place in weight.places.values()]
    ends = [0, *(place.offset + place.nbytes for place in places)]
    assert all(end <= place.offset for end, place in zip(ends, places, strict=False))
    assert ends[-1] == layout.nbytes
