"""Tiny tokenizers of every kind, and random texts in several scripts; needs ``tokenizers`` and transformers alone."""

import random
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARK = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
WORDS = ("Hello", f"{MARK}world", f"{MARK}the", f"{MARK}Hello", "\u017eab", f"{MARK}\u044f", "\u0915\u093e", "the")
SCRIPTS = (
    "aet hlow.,'!?\n",
    "\u00e9\u017eab \u00df",
    "\u044f\u0434\u0430 \u0451",
    "\u4f60\u597d\u3002\u3000",
    "\u0915\u093e\u0928 ",
    "\U0001f600\u200d\U0001f469\ufe0f",
    "\u0628\u0645 \u061f",
)


def random_text(draw: random.Random, longest: int = 14) -> str:
    """Letters of one to three scripts, with words that some of the tokenizers know."""
    letters = "".join(draw.choice(SCRIPTS) for _ in range(draw.randint(1, 3)))
    pieces = [draw.choice((*letters, "Hello", " world", " the", "</s>")) for _ in range(draw.randint(1, longest))]
    return "".join(pieces)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it; line breaks and spaces merge with what stands beside them."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [
        ("\u010a", "\u010a"),
        (".", "\u010a"),
        ("\u0120", "w"),
        ("h", "e"),
        ("t", "he"),
        ("\u0120", "the"),
        ("l", "l"),
    ]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(Regex(r" ?\S+[\r\n]*|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    made.decoder = decoders.ByteLevel()
    return made


def pieces(scheme: str) -> Tokenizer:
    """As Llama 2 and Mistral have it: marks for spaces, and bytes to fall back on. ``scheme``: where marks begin."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, MARK: 257}
    merges = []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            vocab.setdefault(word[end - 1], len(vocab))
            if end > 1 and (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "normaliser":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def word_pieces() -> Tokenizer:
    letters = sorted({letter for script in SCRIPTS for letter in script if not letter.isspace()})
    names = ["<unk>", "Hello", "world", "##world", *letters, *(f"##{letter}" for letter in letters)]
    made = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def unigrams() -> Tokenizer:
    letters = sorted({letter for script in SCRIPTS for letter in script if not letter.isspace()} | {MARK})
    scores = [
        ("<unk>", -20.0),
        *((word, -2.0) for word in dict.fromkeys(WORDS)),
        *((letter, -8.0) for letter in letters),
    ]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "mark first": lambda: pieces("first"),
    "mark always": lambda: pieces("always"),
    "mark never": lambda: pieces("never"),
    "mark by a normaliser": lambda: pieces("normaliser"),
    "word pieces": word_pieces,
    "unigrams": unigrams,
}


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with a token that begins every text, and others for turns."""
    made = KINDS[kind]()
    made.add_special_tokens(list(SPECIAL))
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=True,
    )
