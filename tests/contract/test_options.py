"""Options that are declared once: what the command line, Python and a batch file make of one declaration."""

from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import pytest

from pos2d.commands.shared.flags import in_terms_of_flags
from pos2d.errors import UsageError
from pos2d.options import check_options, option, options_of, split_options, takes_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Brewing:
    """A group with one option of every kind."""

    minutes: int = option(3, "Time in the pot.", minimum=1, maximum=60)
    degrees: float = option(95.0, "Temperature of the water.", maximum=100)
    leaf: Literal["green", "black"] | None = option(None, "Kind of tea.")
    sieve: bool = option(False, "Use a sieve.")
    guests: tuple[str, ...] = option((), "Names.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    cups: int = option(1, "Number of cups.", minimum=1)


@takes_options(Brewing, Serving)
def brew(water: str, *, dry_run: bool = False, **options: Any) -> tuple[str, bool, list[dict[str, Any]]]:
    return water, dry_run, split_options(options, Brewing, Serving)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"minutes": 0}, "`minutes` 0 must be 1 to 60"),
        ({"minutes": 61}, "`minutes` 61 must be 1 to 60"),
        ({"minutes": 2.5}, "`minutes` 2.5 must be a whole number"),
        ({"minutes": True}, "`minutes` True must be a whole number"),
        ({"minutes": "3"}, "`minutes` '3' must be a whole number"),
        ({"minutes": None}, "`minutes` None must be a whole number"),
        ({"degrees": 101}, "`degrees` 101 must be at most 100"),
        ({"degrees": float("nan")}, "`degrees` nan must be a number"),
        ({"degrees": "hot"}, "`degrees` 'hot' must be a number"),
        ({"leaf": "red"}, "`leaf` 'red' is not one of green, black"),
        ({"sieve": 1}, "`sieve` 1 must be true or false"),
        ({"guests": "Ann"}, "`guests` 'Ann' must be a text or several"),
        ({"guests": (1,)}, "must be a text or several"),
    ],
)
def test_values_that_do_not_fit_their_declaration(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"^{words.replace('(', '.').replace(')', '.')}|{words}"):
        Brewing(**values)


def test_values_that_fit() -> None:
    Brewing(minutes=60, degrees=0, leaf="green", sieve=True, guests=("Ann", "Bo"))
    assert Brewing(leaf=None) == Brewing()


def test_a_declaration_says_everything_once() -> None:
    leaf = options_of(Brewing)["leaf"]
    assert (leaf.choices, leaf.optional, leaf.kind, leaf.help) == (("green", "black"), True, str, "Kind of tea.")
    assert list(options_of(Brewing)) == ["minutes", "degrees", "leaf", "sieve", "guests"]


def test_a_function_shows_the_options_that_it_takes() -> None:
    shown = signature(brew).parameters
    assert list(shown) == ["water", "dry_run", *options_of(Brewing), "cups"]
    assert shown["minutes"].default == 3


def test_keywords_reach_the_group_that_declares_them() -> None:
    assert brew("tap", minutes=4, cups=2, leaf=None) == ("tap", False, [{"minutes": 4}, {"cups": 2}])


@pytest.mark.parametrize(
    ("keyword", "words"),
    [("minuts", "; did you mean 'minutes'"), ("dry_runs", "; did you mean 'dry_run'"), ("xyz", "'xyz'$")],
)
def test_an_unknown_keyword_names_the_nearest_one(keyword: str, words: str) -> None:
    with pytest.raises(TypeError, match=rf"^brew\(\) has no keyword '{keyword}'") as error:
        brew("tap", **{keyword: 1})  # type: ignore[arg-type]
    assert words.rstrip("$") in str(error.value)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("give `lora_rank`", "give --lora-rank"),
        ("use `quant='int8'` or `force=True`", "use --quant int8 or --force"),
        ("`float_activations='q_proj,down_proj'` passes", "--float-activations q_proj,down_proj passes"),
        ("run `pos2d plan`", "run `pos2d plan`"),
        ("`config.json` stays", "`config.json` stays"),
    ],
)
def test_messages_name_parameters_and_the_command_line_flags(message: str, shown: str) -> None:
    assert in_terms_of_flags(message) == shown


def test_only_options_that_take_several_texts_may_be_left_out_by_an_empty_tuple() -> None:
    given, _ = split_options({"guests": (), "minutes": ()}, Brewing, Serving)
    assert given == {"minutes": ()}
