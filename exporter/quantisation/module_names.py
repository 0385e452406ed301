"""Linear layers by the short names that people give them."""

from collections.abc import Sequence

from pos2d.errors import UsageError


def named_modules(names: str, modules: Sequence[str], parameter: str) -> tuple[str, ...]:
    """The full names of all ``modules`` that ``names`` matches, in the model's order.

    ``names`` are separated by commas or spaces: full names, last parts (``down_proj``) or whole decoder layers
    (``model.layers.0``). ``parameter`` is how errors call the option that has them.

    Raises:
        UsageError: a name that matches no module.
    """
    patterns = names.replace(",", " ").split()

    def matches(module: str, pattern: str) -> bool:
        return module == pattern or module.endswith(f".{pattern}") or module.startswith(f"{pattern}.")

    unknown = [pattern for pattern in patterns if not any(matches(module, pattern) for module in modules)]
    if unknown:
        kinds = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
        raise UsageError(f"{parameter}: {', '.join(unknown)} names no linear layer of this model; it has {kinds}")
    return tuple(module for module in modules if any(matches(module, pattern) for pattern in patterns))
