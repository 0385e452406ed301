"""The two functions of the trainer's inference script, for programs that use it: merged in memory, run by our engine.

    from pos2d.compat.trainer import load_model_with_lora, generate_text

    model, tokenizer, patch_rope = load_model_with_lora("Qwen/Qwen2-0.5B-Instruct", "lora_final.pth", lora_rank=8)
    print(generate_text(model, tokenizer, "你好"))

``model`` is a transformers model, so ``model.generate(**tokenizer(text, return_tensors="pt"))`` works as well. The
merge is repeated in every process; ``pos2d merge`` once and then :func:`pos2d.load` is faster.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from pos2d.errors import InputError, UsageError
from pos2d.families import MODEL_TYPE_PREFIX, Dimensions
from pos2d.hf.tokenizer import VOCABULARIES, load_tokenizer
from pos2d.layout import build_layout
from pos2d.runtime.backends.options import LoadDtype, LoadOptions
from pos2d.runtime.backends.torch.backend import TorchBackend
from pos2d.runtime.backends.torch.decoder import load_decoder
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.sampling import GENERATION_CONFIG, Sampling
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.runtime.text.text_decode import TextSampler
from pos2d.runtime.text.tokenization import encode_prompts
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions
from pos2d.spec import Align, Rope2DSpec


def load_model_with_lora(
    base_model: str | Path,
    lora_path: str | Path,
    lora_rank: int | None = 8,
    rope_2d_ratio: float = 0.5,
    patch_rope: bool = True,
    device: str = "auto",
    dtype: LoadDtype = "auto",
    *,
    branch_stride: int = 128,
    align_to: Align = "left",
) -> tuple[PreTrainedModel, Any, bool]:
    """Merge an adapter in memory; return the model, its tokenizer and ``patch_rope``, as the trainer's function does.

    The weights are, bit for bit, those that :func:`pos2d.merge` would write and :func:`pos2d.load` would load, but
    nothing is written.

    Args:
        base_model: a directory or a Hub id.
        lora_path: the trainer's file, or a PEFT directory.
        lora_rank: refuses an adapter of another rank; None accepts any.
        rope_2d_ratio: share of the frequencies with 2D positions; unused without ``patch_rope``.
        device: ``auto`` is a GPU if there is one; the trainer's default is ``cuda``.
        dtype: ``auto`` is the stored type of the base; the trainer's default is ``bfloat16``.
        branch_stride: the value used in training. Like ``align_to`` it does not matter for one branch, and
            :func:`generate_text` decodes only one.

    Raises:
        UsageError: a device or type that cannot be used.
        InputError, UnsafeInputError: as :func:`pos2d.merge`; no tokenizer.
        StorageError: the memory cannot hold the weights.
    """
    positions = TrainedPositions(rope_2d_ratio if patch_rope else None, None, not patch_rope, branch_stride, align_to)
    options = LoadOptions(device=device, dtype=dtype)
    base = BaseOptions(base_model=str(base_model), lora=(str(lora_path),), lora_rank=lora_rank)
    opened = open_model(None, base, positions)
    tokenizer = _tokenizer(opened.directory)
    model, _ = load_decoder(opened, options)
    _set_generation(model, opened, tokenizer.pad_token_id)
    return model, tokenizer, patch_rope


def generate_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.1,
    device: str | torch.device | None = None,
    seed: int | None = None,
) -> str:
    """The answer to ``prompt``, stripped. Nothing is printed; the trainer's function prints prompt and answer.

    The prompt is rendered with the chat template if the tokenizer has one. A ``temperature`` of 0 is greedy. Without a
    ``seed`` every call samples another answer; the seed then comes from torch's random numbers, so that
    ``torch.manual_seed`` still makes a program repeatable. ``device`` may only name the device that the model is on.

    Raises:
        UsageError: a value out of range, or a ``device`` that the model is not on.
        InputError: a model that this tool did not make, an empty prompt, or one that is longer than the model.
    """
    spec = _spec_of(model)
    _check_device(model, device)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=int(torch.randint(2**63 - 1, ())) if seed is None else seed,
    )
    chat = bool(tokenizer.chat_template)
    ids = encode_prompts(tokenizer, [prompt], None, chat=chat, add_special_tokens=True).branches[0]
    ends = model.generation_config.eos_token_id
    end_tokens = set(ends) if isinstance(ends, list) else {ends} - {None}
    sampler = TextSampler(tokenizer, sampling, (0,), end_tokens, ids)
    backend = TorchBackend(model, getattr(model, "hf_device_map", None) or {"": model.device})
    limit = Dimensions.from_config(model.config.to_dict(), "the model's configuration").context_length
    for _ in decode(backend, build_layout([ids], spec), [sampler], context_length=limit):
        pass
    return sampler.take_text(last=True).strip()


def _tokenizer(directory: Path) -> Any:
    """The tokenizer of a model; without a padding token it pads with its end token.

    Raises:
        InputError: the model has no tokenizer, or none that transformers can read.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise InputError(f"{directory} has none of {', '.join(VOCABULARIES)}; copy the model again")
    tokenizer: Any = load_tokenizer(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_generation(model: PreTrainedModel, opened: OpenedModel, pad_token: int | None) -> None:
    """Set the defaults of ``model.generate``: the model's generation settings, its end tokens and a padding token."""
    if (opened.directory / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(opened.directory)
    if opened.manifest.eos_token_ids:
        model.generation_config.eos_token_id = list(opened.manifest.eos_token_ids)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = pad_token


def _spec_of(model: Any) -> Rope2DSpec:
    """The positions that are baked into a model.

    Raises:
        InputError: a model that this tool did not make.
    """
    config = getattr(model, "config", None)
    if not str(getattr(config, "model_type", "")).startswith(MODEL_TYPE_PREFIX):
        raise InputError(
            f"{type(model).__name__} is not a model of this tool, so its positions are unknown; "
            "load it with load_model_with_lora"
        )
    return Rope2DSpec.from_dict(model.config.rope_2d)


def _check_device(model: PreTrainedModel, device: str | torch.device | None) -> None:
    """Check that ``device``, if given, is the device of the model.

    Raises:
        UsageError: it is another device, or none that torch knows.
    """
    if device is None or str(device) == "auto":
        return
    try:
        named = torch.device(device)
    except RuntimeError:
        raise UsageError(f"`device` {device!r} is not one that torch knows; leave it out") from None
    numbers = {named.index, model.device.index} - {None}  # "cuda" without a number is any GPU
    if named.type != model.device.type or len(numbers) > 1:
        raise UsageError(
            f"the model is on {model.device}, not on {device}; leave `device` out, or load the model there"
        )
