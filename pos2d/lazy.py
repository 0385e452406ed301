"""Packages that import what they offer when it is first used, so that importing them costs nothing."""

from importlib import import_module

# As in __init__.py: this runs before ``python -m pos2d`` stops searching the current directory.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def lazy_attributes(
    package: str, modules: "Mapping[str, str]"
) -> "tuple[Callable[[str], Any], Callable[[], list[str]]]":
    """``__getattr__`` and ``__dir__`` for the ``__init__.py`` of ``package``; ``modules`` has a module for every name.

    The attribute is looked up once and then stored in the package, so that later uses are ordinary ones.
    """

    def get(name: str) -> "Any":
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        setattr(import_module(package), name, value)
        return value

    return get, lambda: sorted(modules)
