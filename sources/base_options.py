"""Which base model and adapters the weights come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pos2d.options import check_options, option, texts


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOptions:
    """A base model and its adapters; paths may also be given as :class:`pathlib.Path`, several adapters as a list.

    Raises:
        UsageError: a value of another type.
    """

    base_model: str | None = option(
        None,
        "Base model that the adapter was trained on: a directory, or NAME@REVISION on the Hugging Face Hub.",
        metavar="DIR_OR_HUB_ID",
    )
    revision: str | None = option(
        None, "Git commit, tag or branch of a base model on the Hub.", metavar="COMMIT", default_text="the newest"
    )
    lora: tuple[str, ...] = option(
        (),
        "Adapter: the trainer's .pth file, a PEFT or MLX directory, or NAME@REVISION on the Hugging Face Hub. Repeat "
        "the flag for the sum of several; WEIGHT scales what an adapter adds.",
        metavar="PATH[=WEIGHT]",
        default_text="weight 1",
        flags=("--lora-path",),
    )
    then: tuple[str, ...] = option(
        (),
        "Adapter that was trained on the result of all before it. Repeat the flag for a longer chain.",
        metavar="PATH[=WEIGHT]",
    )
    tokenizer: str | None = option(
        None,
        "Directory whose tokenizer and chat template are used.",
        metavar="DIR",
        default_text="the last adapter that has its own, or else the base model",
    )
    lora_rank: int | None = option(None, "Refuse adapters of another rank than this.", default_text="any rank")

    def __post_init__(self) -> None:
        for name in ("base_model", "tokenizer"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("lora", "then"):
            object.__setattr__(self, name, _adapters(getattr(self, name)))
        check_options(self)


def _adapters(given: str | Path | Sequence[str | Path]) -> object:
    """One adapter or several, as a tuple of texts; anything else as it is, for the check of types."""
    listed = texts(str(given) if isinstance(given, Path) else given)
    if not isinstance(listed, tuple):
        return listed
    return tuple(str(path) if isinstance(path, Path) else path for path in listed)
