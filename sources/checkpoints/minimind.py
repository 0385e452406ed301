"""Recognises models of MiniMind's architecture, which ParallelMind trains too and transformers does not have."""

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "minimind"
EMBEDDING = "model.embed_tokens.weight"
# `--pe fpe` of train_pretrain.py and train_full_sft.py: a table of vectors, one of which is added to every embedding.
FOURIER = "fourier_pe."
EXPERTS = (".mlp.experts.", ".mlp.shared_experts.")
# What train_pretrain.py stores beside the weights, and MiniMind's trainer in the files from which it resumes.
OF_PRETRAINING = {"model_state_dict", "tokenizer_path", "vocab_size"}
OF_RESUMING = {"model", "optimizer", "epoch", "step"}
# The size of the tokenizer that both projects ship.
VOCABULARY = 6400

ARCHITECTURE = "the architecture of MiniMind and ParallelMind, which transformers does not have"
TRAIN_AGAIN = "run it with ParallelMind, or train on a Hugging Face base"
CONVERT = "convert it to a Llama or Qwen3 model of transformers, and give that directory as the base"
ITS_VOCABULARY = f"has the vocabulary of {ARCHITECTURE}; {CONVERT}"
FPE = f"a Fourier encoding of branches that is added to the embeddings, which is not supported; {TRAIN_AGAIN}"


def describe_minimind(content: Mapping[Any, object]) -> str | None:
    """What a file of ``torch.save`` with this ``content`` is, and what to do; None if it may be something else.

    A LoRA that was trained over such a model is not recognised: it holds the low-rank factors alone.
    """
    keys = {str(key) for key in content}
    names = {str(name) for value in (content, content.get("model_state_dict")) for name in _keys(value)}
    fourier = next((name for name in sorted(names) if FOURIER in name), None)
    if fourier is not None:
        return f"was trained with ParallelMind's --pe fpe (tensor {fourier}), {FPE}"
    if keys >= OF_RESUMING:
        return "is a state from which MiniMind resumes a training; give the weights that were saved beside it"
    expert = next((name for name in sorted(names) if any(part in name for part in EXPERTS)), None)
    if expert is not None:
        return f"is of a mixture of experts, as MiniMind has them (tensor {expert}); train on a dense Hugging Face base"
    if keys >= OF_PRETRAINING:
        return f"is a model of {ARCHITECTURE}, as train_pretrain.py saves it; {CONVERT}"
    return None


def has_its_vocabulary(content: Mapping[Any, Any]) -> bool:
    """Whether there is an embedding for as many tokens as the tokenizer of these projects has.

    Names do not tell a dense model of theirs from a Llama or Qwen3, so this is a hint where it does not fit.
    """
    return tuple(getattr(content.get(EMBEDDING), "shape", ()))[:1] == (VOCABULARY,)


def describe_minimind_config(config: Mapping[str, Any]) -> str:
    """What a model with this ``config.json`` is, whose ``model_type`` is :data:`MODEL_TYPE`, and what to do."""
    if config.get("pe_type") == "fpe":
        return f"the model was trained with ParallelMind's --pe fpe (pe_type), {FPE}"
    if config.get("use_moe"):
        return f"minimind with use_moe is a mixture of experts of {ARCHITECTURE}; {TRAIN_AGAIN}"
    return f"minimind is {ARCHITECTURE}; {CONVERT}"


def _keys(value: object) -> list[Any]:
    return list(value) if isinstance(value, Mapping) else []
