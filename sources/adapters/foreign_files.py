"""Recognises files that are no adapter for these models, or none that can be merged, so that a message can say so."""

import re
from collections.abc import Iterable
from pathlib import Path

from pos2d.git_lfs import refuse_pointer

STATES = re.compile(
    r"(rng_state(_\d+)?|optimizer(_\d+)?|scheduler|scaler|random_states_\d+|training_args|trainer_state)\.(pth|pt|bin|pkl|json)"
)
DIR = "give the directory that PEFT saved, with adapter_config.json"
# What names of tensors say about the program that wrote them, and what to do then.
NAMES = (
    (r"lokr_w|hada_w|oft_blocks|\.diff$", "is an adapter of LyCORIS (LoKr, LoHa or OFT), which cannot be merged here"),
    (r"^lora_(unet|te\d?|transformer)_", "is a LoRA of an image model in the format of kohya's scripts"),
    (r"^(unet|text_encoder(_2)?|transformer)\.", "is a LoRA of an image model in the format of diffusers"),
    (r"\.lora_a$|\.lora_b$", "is an adapter of MLX without its adapter_config.json; give the directory that MLX wrote"),
    (r"lora_(A|B|embedding_A|down|up)\b", f"has the tensors of a LoRA, but not their scale; {DIR}"),
    (r"embed_tokens\.weight$|_proj\.weight$", f"has the weights of a model, not of an adapter; {DIR}"),
)  # fmt: skip
UNKNOWN = "is not an adapter that this tool knows; give the trainer's .pth file or a PEFT directory"


def is_training_state(path: Path) -> bool:
    """Whether a file has the name of what trainers save beside the weights, to continue a training."""
    return STATES.fullmatch(path.name) is not None


def describe_foreign(path: Path) -> str | None:
    """What a file is and what to do, by its name and the names of its tensors; None if it may be the trainer's.

    Raises:
        InputError: it is a Git LFS pointer.
    """
    if is_training_state(path):
        return "is a state of a training, not an adapter; give the adapter that was saved beside it"
    if path.suffix == ".gguf":
        return "is a GGUF file; give the trainer's .pth file or the PEFT directory from which it was converted"
    if path.suffix == ".npz":
        return "is an adapter of an old release of MLX; convert it to adapters.safetensors with a newer one"
    if path.suffix == ".json":
        return "is one settings file; give the adapter's directory"
    if path.suffix != ".safetensors":
        return None
    refuse_pointer(path)
    return of_tensors(_tensor_names(path))


def of_tensors(names: Iterable[str]) -> str:
    """What a safetensors file is by the names of its tensors, and what to do."""
    names = list(names)
    return next((says for pattern, says in NAMES if any(re.search(pattern, name) for name in names)), UNKNOWN)


def _tensor_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as content:
            return list(content.keys())
    except (SafetensorError, OSError):
        return []
