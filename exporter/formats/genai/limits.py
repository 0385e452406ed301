"""What onnxruntime-genai does otherwise than the model's own files say."""

import json
from collections.abc import Iterator
from typing import Any

from pos2d.sources.sidecars.sidecars import GENERATION_SETTINGS, TOKENIZER, read_settings
from pos2d.sources.source import Source

# Keys of generation_config.json that change the tokens, and for which genai_config.json has none.
WITHOUT_PLACE = (
    "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_new_tokens", "min_new_tokens", "stop_strings",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)  # fmt: skip


def genai_warnings(source: Source) -> Iterator[str]:
    """A sentence about the tokenizer and one about generation settings, as far as there is something to say.

    Release 0.18 was compared with transformers: SmolLM2's tokenizer of bytes gave the same tokens in all usual texts,
    Mistral's of SentencePiece others where several spaces follow each other, and other kinds none or wrong ones.
    """
    settings = source.sidecars.files.get(GENERATION_SETTINGS)
    given = {} if settings is None else read_settings(settings)
    keys = [key for key in WITHOUT_PLACE if given.get(key) is not None]
    if keys:
        yield f"{GENERATION_SETTINGS}: onnxruntime-genai has no setting for {', '.join(keys)}, and does without"
    model = _tokenizer(source).get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind not in (None, "BPE"):
        yield f"onnxruntime-genai cannot read a {kind} tokenizer; give it token ids that transformers makes"
    elif isinstance(model, dict) and model.get("byte_fallback"):
        yield (
            "the tokenizer of onnxruntime-genai makes other tokens of several spaces in a row than this one; give it "
            "token ids that transformers makes, or texts without indentation"
        )


def _tokenizer(source: Source) -> dict[str, Any]:
    """The content of tokenizer.json; empty without one, or where it is damaged, which its users report."""
    path = source.sidecars.files.get(TOKENIZER)
    try:
        if source.sidecars.converted is not None:
            content = json.loads(source.sidecars.converted)
        else:
            content = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
