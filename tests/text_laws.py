"""Laws of tokenization that hold for every tokenizer and release of transformers; each is checked on random texts."""

import random

from pos2d.runtime.text.detokenizer import StreamDetokenizer
from pos2d.runtime.text.tokenization import encode, encode_prompts
from tests.tiny_tokenizers import random_text, tiny_tokenizer

TEXTS = 300  # of each of seven kinds


def check_seams(kind: str, seed: int = 0) -> None:
    """A context and prompts have the tokens of their whole texts, and every prompt keeps one of its own."""
    draw = random.Random(seed)
    tokenizer = tiny_tokenizer(kind)
    shared = 0
    for number in range(TEXTS):
        special = number % 2 == 0
        context = random_text(draw) + draw.choice(("", "</s>", "\n"))
        prompts = [random_text(draw, 6) for _ in range(1 + number % 3)]
        prompts = [prompt if prompt.strip() else "the" for prompt in prompts]
        encoded = encode_prompts(tokenizer, prompts, context, chat=False, add_special_tokens=special)
        wholes = [encode(tokenizer, context + prompt, special) for prompt in prompts]
        assert [[*(encoded.context or ()), *ids] for ids in encoded.branches] == wholes, (context, prompts)
        assert all(encoded.branches)
        shared += len(encoded.context or ()) >= len(encode(tokenizer, context, special)) - 3
    assert shared > TEXTS / 2  # most of the context is shared


def check_growing(kind: str, seed: int = 1) -> None:
    """Text that grows is at every step a beginning of all tokens decoded at once, and in the end it is that text."""
    draw = random.Random(seed)
    tokenizer = tiny_tokenizer(kind)
    size = len(tokenizer)
    for number in range(TEXTS):
        ids = encode(tokenizer, random_text(draw))
        for _ in range(draw.randint(0, 3)):  # special tokens, and tokens that no model would write there
            ids.insert(draw.randint(0, len(ids)), draw.choice((size - 1, size - 2, draw.randrange(size), size + 7)))
        if number % 3 == 0:
            ids = [draw.randrange(size) for _ in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = StreamDetokenizer(tokenizer)
        for token in ids:
            text.append(token)
            assert whole.startswith(text.text), (ids, whole, text.text)
        text.close()
        assert text.text == whole, (ids, whole, text.text)
