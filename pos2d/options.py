"""Options that are declared once, with type, default, range and help text beside each field of a frozen dataclass.

Such a dataclass is a *group*. The command line makes its flags from the fields, Python functions take the fields as
keywords, and a line of a ``batch`` file has them as keys::

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Sampling:
        temperature: float = option(0.0, "Sampling temperature; 0 is greedy.", maximum=100)

        def __post_init__(self) -> None:
            check_options(self)

A field's type is ``bool``, ``int``, ``float``, ``str``, a ``Literal`` of strings, ``tuple[str, ...]``,
``Mapping[str, Any]``, or one of them ``| None``.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pos2d.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
METADATA_KEY = "option"
KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a text or several",
    Mapping: "a JSON object",
}


@dataclass(frozen=True, slots=True)
class Option:
    """What is declared beside a field.

    ``minimum`` and ``maximum`` are inclusive. ``default_text`` is what help shows as the default, where the dataclass's
    own default only applies if the artifact has none. ``flags`` are further spellings on the command line, such as
    ``-n``; ``section`` is the heading under which the help page has the option. With ``escapes`` the command line reads
    a backslash and a letter as what they stand for in Python, such as a line break.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    metavar: str | None = None
    default_text: str | None = None
    flags: tuple[str, ...] = ()
    section: str | None = None
    escapes: bool = False


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field of a group; ``facts`` are fields of :class:`Option`."""
    return field(default=default, metadata={METADATA_KEY: {"help": help, **facts}})


def options_of(group: type[Any]) -> Mapping[str, Option]:
    """The options that a group declares, by name, in their order."""
    return _options_of(cast(Hashable, group))


@cache
def _options_of(group: Any) -> Mapping[str, Option]:
    hints = get_type_hints(group)
    return {
        f.name: Option(
            f.name,
            *_kind_of(hints[f.name]),
            default=None if f.default is MISSING else f.default,
            choices=_choices_of(hints[f.name]),
            **f.metadata[METADATA_KEY],
        )
        for f in fields(group)
        if METADATA_KEY in f.metadata
    }


def check_options(values: Any) -> None:
    """Check every option of a group's instance against its declared type, choices and range.

    Raises:
        UsageError: a value of another type, or out of range; the message names the option in backticks.
    """
    for name, declared in options_of(type(values)).items():
        check_option(declared, getattr(values, name))


def check_option(declared: Option, value: Any) -> None:
    """Check one value.

    Raises:
        UsageError: as :func:`check_options`.
    """
    if value is None and declared.optional:
        return
    shown = f"`{declared.name}` {value!r}"
    if declared.choices:
        if value not in declared.choices:
            raise UsageError(f"{shown} is not one of {', '.join(declared.choices)}")
    elif not _has_kind(value, declared.kind):
        raise UsageError(f"{shown} must be {KINDS[declared.kind]}")
    low, high = declared.minimum, declared.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        raise UsageError(f"{shown} must be {_range_text(low, high)}")


def takes_options(*groups: type[Any]) -> Callable[[F], F]:
    """Let a function take the fields of ``groups`` as keywords; it receives them in its ``**options``.

    The function's signature then shows every field. A keyword that does not exist is a TypeError that names the nearest
    one, as Python's own is.
    """

    def decorate(function: F) -> F:
        own = signature(function)
        named = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        declared = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=declared.default)
            for group in groups
            for name, declared in options_of(group).items()
            if name not in own.parameters
        ]
        known = [p.name for p in (*named, *declared)]

        @wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            check_keywords(function.__name__, keywords, known)
            return function(*arguments, **keywords)

        checked.__signature__ = own.replace(parameters=[*named, *declared])  # type: ignore[attr-defined]
        checked.option_groups = groups  # type: ignore[attr-defined]
        return cast(F, checked)

    return decorate


def check_keywords(function: str, keywords: Mapping[str, Any], known: list[str]) -> None:
    """Check the names of keywords.

    Raises:
        TypeError: one that ``function`` does not have, with the nearest that it has.
    """
    for name in keywords:
        if name not in known:
            raise TypeError(f"{function}() has no keyword {name!r}{nearest(name, known)}")


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'temperature'?``, or nothing where no known name is similar."""
    similar = get_close_matches(name, known, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def split_options(keywords: Mapping[str, Any], *groups: type[Any]) -> list[dict[str, Any]]:
    """The keywords that belong to each of ``groups``, without those that were not given: None, or no texts at all."""
    return [
        {
            name: keywords[name]
            for name, declared in options_of(group).items()
            if keywords.get(name) is not None and (declared.kind is not tuple or keywords[name] != ())
        }
        for group in groups
    ]


def read_options(keywords: Mapping[str, Any], *groups: type[Any]) -> list[Any]:
    """An instance of each of ``groups``, made of the keywords that belong to it and were given.

    Raises:
        UsageError: as the groups.
    """
    return [group(**given) for group, given in zip(groups, split_options(keywords, *groups), strict=True)]


def texts(value: Any) -> Any:
    """A text, or a list of texts, as the tuple that an option of several texts holds."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _kind_of(hint: Any) -> tuple[type, bool]:
    """The plain type behind a field's annotation, and whether None is allowed."""
    if get_origin(hint) in (Union, UnionType):
        inner = [part for part in get_args(hint) if part is not NoneType]
        return _kind_of(inner[0])[0], True
    if get_origin(hint) is Literal:
        return str, False
    return get_origin(hint) or hint, False


def _choices_of(hint: Any) -> tuple[str, ...]:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def _has_kind(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(text, str) for text in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _range_text(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at least {low:.10g}" if low is not None else f"at most {high:.10g}"
    return f"{low:.10g} to {high:.10g}"
