"""The trainer's LoRA file: pairs of low-rank factors by module, checked to be whole and to fit the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.base import Checkpoint
from exporter.pickle_guard import check_pickle
from exporter.staging import sha256
from pos2d.errors import InputError

if TYPE_CHECKING:
    import torch

PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".lora.A.weight", ".lora.B.weight")


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """``factors[module]`` is ``(A [r, in], B [out, r])``; the change of a weight is ``B @ A``."""

    path: Path
    sha256: str
    rank: int
    factors: Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]

    def delta(self, module: str) -> "torch.Tensor":
        """Float32 ``[out, in]``."""
        a, b = self.factors[module]
        return b.float() @ a.float()

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.path.name, "sha256": self.sha256, "rank": self.rank, "modules": len(self.factors)}


def read_adapter(lora: str | Path, base: Checkpoint, lora_rank: int | None = None) -> Adapter:
    """Read ``lora`` without running code from it and hold every tensor against ``base``.

    Raises:
        InputError: not a LoRA file, a rank other than ``lora_rank``, a missing or left-over tensor, shapes of another
            base, or values that are not finite.
        UnsafeInputError: the file would run code.
    """
    path = _find(Path(lora))
    tensors = _load(path)
    factors = _pair(tensors, path)
    rank = _common_rank(factors, path)
    if lora_rank is not None and lora_rank != rank:
        raise InputError(f"{path} has rank {rank}, not {lora_rank}; leave --lora-rank out or give {rank}")
    _check_fit(factors, base, path)
    return Adapter(path, sha256(path), rank, factors)


def _find(path: Path) -> Path:
    """The file itself, or the only ``.pth`` of a directory."""
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} does not exist; give the trainer's .pth file")
        return path
    files = sorted(path.glob("*.pth"))
    if len(files) != 1:
        found = (
            "is a PEFT directory, which is"
            if (path / "adapter_config.json").is_file()
            else f"has {len(files)} .pth files,"
        )
        raise InputError(f"{path} {found} not supported; give one .pth file of the trainer")
    return files[0]


def _load(path: Path) -> dict[str, "torch.Tensor"]:
    check_pickle(path)
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged archive provokes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path} is not a LoRA file: it does not hold a dictionary of tensors")
    if not any(str(name).endswith(SUFFIXES) for name in content):
        raise InputError(f"{path} is not a LoRA file: no tensor is named *.lora.A.weight or *.lora.B.weight")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in content.items():
        short = _strip(str(name))
        if short in tensors:
            raise InputError(f"{path}: tensor {name} is there twice, under different prefixes; save the adapter again")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, not a dense floating-point tensor")
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: tensor {name} has NaN or infinite values; the training diverged, use an earlier file"
            )
        tensors[short] = tensor
    return tensors


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _pair(tensors: Mapping[str, "torch.Tensor"], path: Path) -> dict[str, tuple["torch.Tensor", "torch.Tensor"]]:
    extra = sorted(name for name in tensors if not name.endswith(SUFFIXES))
    if extra:
        raise InputError(f"{path} has tensors that are not LoRA factors: {_some(extra)}; save the adapter alone")
    modules = sorted({name.removesuffix(SUFFIXES[0]).removesuffix(SUFFIXES[1]) for name in tensors})
    missing = [module + suffix for module in modules for suffix in SUFFIXES if module + suffix not in tensors]
    if missing:
        raise InputError(f"{path} lacks the tensor {_some(missing)}; the file is not whole, save the adapter again")
    return {module: (tensors[module + SUFFIXES[0]], tensors[module + SUFFIXES[1]]) for module in modules}


def _common_rank(factors: Mapping[str, tuple["torch.Tensor", "torch.Tensor"]], path: Path) -> int:
    flat = sorted(module for module, (a, b) in factors.items() if a.dim() != 2 or b.dim() != 2)
    if flat:
        raise InputError(f"{path}: the factors of {_some(flat)} are not matrices; save the adapter again")
    ranks = sorted({size for a, b in factors.values() for size in (a.shape[0], b.shape[1])})
    if len(ranks) != 1 or ranks[0] == 0:
        raise InputError(
            f"{path} mixes the ranks {', '.join(map(str, ranks))}; the trainer writes one rank above 0 for all modules"
        )
    return ranks[0]


def _check_fit(factors: Mapping[str, tuple["torch.Tensor", "torch.Tensor"]], base: Checkpoint, path: Path) -> None:
    linears = base.linear_shapes()
    left_over = sorted(set(factors) - set(linears))
    kinds = {_kind(module) for module in factors}
    square = {module for module, shape in linears.items() if shape[0] == shape[1]}
    owed = square | {module for module in linears if _kind(module) in kinds}
    missing = sorted(owed - set(factors))
    wrong = [
        f"{module} ({b.shape[0]}, {a.shape[1]}) instead of {linears[module]}"
        for module, (a, b) in factors.items()
        if module in linears and (b.shape[0], a.shape[1]) != linears[module]
    ]
    faults = [
        f"{label} {_some(names)}"
        for label, names in (("wrong shapes", wrong), ("missing modules", missing), ("left-over modules", left_over))
        if names
    ]
    if faults:
        raise InputError(
            f"{path} does not fit {base.directory}: {'; '.join(faults)}; give the base that it was trained on"
        )


def _kind(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
