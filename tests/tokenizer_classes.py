"""The tokenizer that this project loads beside the one that transformers' ``AutoTokenizer`` loads."""

import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from pos2d.hf.tokenizer import load_tokenizer
from tests.tiny_tokenizers import tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CLASSES = (None, "PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer")
TEXTS = ("Hello world", " the Hello</s>Hello\nthe.\n", "\u017eab \U0001f600 12345")


def differences(directory: str | Path) -> list[str]:
    """The families and declared classes for which the two differ, in a base or in an ONNX artifact made of it."""
    found = []
    for kind in ("bytes", "mark by a normaliser"):
        base, artifact = Path(directory) / kind / "base", Path(directory) / kind / "artifact"
        for place in (base, artifact):
            place.mkdir(parents=True)
            tiny_tokenizer(kind).backend_tokenizer.save(str(place / "tokenizer.json"))
        for family in FAMILIES:
            config = AutoConfig.for_model(family)
            config.save_pretrained(base)
            (artifact / "manifest.json").write_text(json.dumps({"family": family}), encoding="utf-8")
            for name in CLASSES:
                settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
                for place in (base, artifact):
                    text = json.dumps(settings | ({"tokenizer_class": name} if name else {}))
                    (place / "tokenizer_config.json").write_text(text, encoding="utf-8")
                want = AutoTokenizer.from_pretrained(base)
                for place in (base, artifact):
                    got = load_tokenizer(place)
                    if any(got(text).input_ids != want(text).input_ids for text in TEXTS):
                        found.append(f"{kind}, {family}, {name}: {type(got).__name__}, not {type(want).__name__}")
    return found
