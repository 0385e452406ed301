"""The user's own keys of a line, such as an id or the expected answer, which its record repeats."""

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pos2d.errors import InputError
from pos2d.runtime.engine.generation_settings import READERS, STOP_KEY, UNUSED_KEYS

RECORD_KEYS = ("line", "completions", "error")
# Names that other programs have for our options.
OTHER_NAMES = {
    "temp": "temperature",
    "n": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "min_tokens": "min_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "eos_token_id": "end_token",
    "system": "context",
    "system_prompt": "context",
    "tools": "chat_template_kwargs",
    "enable_thinking": "chat_template_kwargs",
    "response_format": "json_schema",
    "guided_json": "json_schema",
    STOP_KEY: "stop",
}
# Settings of other programs that we do not have, so that none of them is taken for the user's own data.
OTHER_SETTINGS = {*READERS, *UNUSED_KEYS, "do_sample", "best_of"}
# Keys of data sets that are not misspelt options, though they look like it.
IDENTIFIERS = ("prompt_id", "context_id")
# How similar a key must be to an option to count as misspelt.
MISSPELT = 0.8


def own_keys(block: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The keys of a line that are not ``known``, with their values.

    Raises:
        InputError: a key that looks like an option or is one of another program, one that the record has itself, or
            values that JSON in UTF-8 cannot hold.
    """
    own = {name: value for name, value in block.items() if name not in known}
    for name in own:
        _check_name(name, known)
    try:
        json.dumps(own, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise InputError(
            f"{' or '.join(own)} cannot be written again: it has NaN, Infinity or a lone surrogate"
        ) from None
    return own


def _check_name(name: str, known: Collection[str]) -> None:
    plain = name.lower().replace("-", "_")
    if name in RECORD_KEYS:
        raise InputError(f'a line takes no {name!r}, since the record of its answer has one; put your own under "meta"')
    if plain in IDENTIFIERS:
        return
    meant = [plain] if plain in known else get_close_matches(plain, known, n=1, cutoff=MISSPELT)
    if plain in OTHER_NAMES:
        meant = [OTHER_NAMES[plain]]
    if meant:
        hint = f"did you mean {meant[0]!r}?"
    elif plain in OTHER_SETTINGS:
        hint = "it is a setting of another program"
    else:
        return
    raise InputError(f'a line takes no {name!r}; {hint} (your own data may stand under "meta")')
