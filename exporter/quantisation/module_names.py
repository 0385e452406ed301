"""Linear layers as people name them on a command line."""

from collections.abc import Sequence

from pos2d.errors import UsageError


def named_modules(names: str, modules: Sequence[str], flag: str) -> tuple[str, ...]:
    """Full names of those of ``modules`` that ``names`` means, in the model's order: full names, last parts
    (``down_proj``) or whole blocks (``model.layers.0``), separated by commas; ``flag`` names it in errors.

    Raises:
        UsageError: a name that means none.
    """
    wanted = names.replace(",", " ").split()

    def named(module: str, part: str) -> bool:
        return module == part or module.endswith(f".{part}") or module.startswith(f"{part}.")

    unknown = [part for part in wanted if not any(named(module, part) for module in modules)]
    if unknown:
        kinds = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
        raise UsageError(f"{flag}: {', '.join(unknown)} names no linear layer of this model; it has {kinds}")
    return tuple(module for module in modules if any(named(module, part) for part in wanted))
