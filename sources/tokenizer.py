"""Chooses the tokenizer, chat template and generation settings that travel with an artifact."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.hf.tokenizer import first_line
from pos2d.sources.adapters import Adapter
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.hf_config import end_tokens
from pos2d.sources.sidecars.sidecars import (
    GENERATION_SETTINGS,
    SPECIAL_TOKENS,
    TEMPLATES,
    TOKENIZER,
    TOKENIZER_FILES,
    TOKENIZER_SETTINGS,
    VOCABULARIES,
    Files,
    Sidecars,
    check_sidecars,
    files_in,
    read_settings,
)
from pos2d.sources.sidecars.tokenizer_settings import NAMED_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHOICE = "give the directory of the one to take as `tokenizer`, such as that of the base"
# How two programs may save one tokenizer differently.
INCIDENTAL = ("truncation", "padding")


def choose_sidecars(
    base: Checkpoint, result: Checkpoint, adapters: Sequence[Adapter], tokenizer: str | Path | None
) -> tuple[Sidecars, list[str]]:
    """The files that travel, and warnings: of ``tokenizer``, of the last adapters that have their own, or of the base.

    ``result`` is ``base`` with the vocabulary that it has once the adapters are merged.

    Raises:
        InputError: a directory without a tokenizer, adapters with different ones, settings that cannot be read, or a
            tokenizer with tokens that the merged model does not have.
    """
    of_base = files_in(base.directory)
    check_sidecars(of_base)
    owner, own = _chosen(adapters, tokenizer)
    check_sidecars(own)
    files = _combined(of_base, own)
    sidecars = Sidecars(files, owner if own else "base")
    sidecars, warnings = _with_tokenizer_json(sidecars, result)
    if own or result.sizes.vocab != base.sizes.vocab:
        _check_fit(sidecars, own, of_base, base, result)
        warnings += _without_new_tokens(sidecars, own, base, result)
    if own:
        ends = _end_tokens(sidecars, own, base)
        if ends != end_tokens(base):
            sidecars = replace(sidecars, end_tokens=ends)
    return sidecars, warnings


def sidecars_of_artifact(merged: Checkpoint) -> tuple[Sidecars, list[str]]:
    """The files that travel from a merged directory, and warnings.

    Raises:
        InputError: settings that cannot be read.
    """
    files = files_in(merged.directory)
    check_sidecars(files)
    return _with_tokenizer_json(Sidecars(files), merged)


def _chosen(adapters: Sequence[Adapter], tokenizer: str | Path | None) -> tuple[str, dict[str, Path]]:
    """Whose files replace those of the base, and which; none if the base's travel."""
    if tokenizer is not None:
        directory = Path(tokenizer)
        if not directory.is_dir():
            place = (
                f"is one file; give its directory, {directory.parent},"
                if directory.is_file()
                else "is no directory; give one"
            )
            raise InputError(f"{directory} {place} as `tokenizer`")
        files = files_in(directory)
        if not _has_vocabulary(directory):
            raise InputError(f"{directory} has no tokenizer; give a directory with tokenizer.json as `tokenizer`")
        return directory.name, files
    owners = [(adapter, files) for adapter in adapters if (files := _files_of(adapter))]
    last = max((adapter.step for adapter, _ in owners), default=0)
    latest = [(adapter, files) for adapter, files in owners if adapter.step == last]
    if not latest:
        return "base", {}
    (adapter, files), *others = latest
    for other, its_files in others:
        difference = _difference(files, its_files)
        if difference:
            raise InputError(f"{adapter.path} and {other.path} come with different {difference}; {CHOICE}")
    return adapter.name, files


def _files_of(adapter: Adapter) -> dict[str, Path]:
    """The files of an adapter's directory that travel; the trainer saves none with its file."""
    if not adapter.path.is_dir():
        return {}
    patterns = TOKENIZER_FILES if _has_vocabulary(adapter.path) else TEMPLATES
    return files_in(adapter.path, (GENERATION_SETTINGS, *patterns))


def _has_vocabulary(directory: Path) -> bool:
    return bool(files_in(directory, VOCABULARIES))


def _combined(of_base: Files, own: Files) -> dict[str, Path]:
    """The base's files with those that replace them: a tokenizer as a whole, templates alone, generation settings."""
    generation = {name: path for name, path in of_base.items() if name == GENERATION_SETTINGS}
    tokenizer = {name: path for name, path in own.items() if name != GENERATION_SETTINGS}
    if not tokenizer:
        return {**of_base, **own}
    if any(Path(name).match(pattern) for name in tokenizer for pattern in VOCABULARIES):
        return {**generation, **own}
    kept = {name: path for name, path in of_base.items() if not any(Path(name).match(p) for p in TEMPLATES)}
    return {**kept, **own}


def _difference(one: Files, other: Files) -> str:
    """What differs between two adapters' files, in words; empty if they mean the same."""
    for what, names in (
        ("tokenizers", {TOKENIZER}),
        ("generation settings", {GENERATION_SETTINGS}),
        ("chat templates", {name for name in {*one, *other} if name.endswith(".jinja")}),
    ):
        for name in names:
            if _meaning(one.get(name)) != _meaning(other.get(name)):
                return what
    if TOKENIZER not in one and _bytes(one) != _bytes(other):
        return "tokenizers"
    if _token_settings(one) != _token_settings(other):
        return "tokenizers"
    return ""


def _meaning(path: Path | None) -> object:
    if path is None or path.suffix != ".json":
        return None if path is None else path.read_bytes()
    content = read_settings(path)
    return {key: value for key, value in content.items() if key not in (*INCIDENTAL, "transformers_version")}


def _bytes(files: Files) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items() if any(Path(name).match(p) for p in VOCABULARIES)}


def _token_settings(files: Files) -> dict[str, Any]:
    settings = _settings(files)
    return {name: _text(settings.get(name)) for name in ("bos_token", "eos_token", "chat_template")}


def _settings(files: Files) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS, TOKENIZER_SETTINGS):
        if name in files:
            found |= read_settings(files[name])
    return found


def _text(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _with_tokenizer_json(sidecars: Sidecars, result: Checkpoint) -> tuple[Sidecars, list[str]]:
    """With a tokenizer.json made of the other files, if they have none, or a warning that it cannot be made."""
    names = [name for name in sidecars.files if any(Path(name).match(pattern) for pattern in VOCABULARIES)]
    if TOKENIZER in sidecars.files or not names:
        return sidecars, []
    try:
        converted, settings = _convert(sidecars.files, result.sizes.family)
    except Exception as error:  # transformers and the libraries behind it raise anything
        return sidecars, [
            f"the tokenizer has {', '.join(names)} but no {TOKENIZER}, and transformers cannot convert it "
            f"({first_line(error)}); the artifact takes token ids only: save the tokenizer with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) and give that directory as `tokenizer`"
        ]
    return replace(sidecars, converted=converted, settings=settings), []


def _convert(files: Files, model_type: str) -> tuple[str, dict[str, Any]]:
    """tokenizer.json, by transformers' own converter, and the special tokens that its class adds; runs no code of the
    files."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(folder) / name)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} has no fast form")
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name in NAMED_TOKENS}
        return tokenizer.backend_tokenizer.to_str(), special


def _vocabulary(files: Files, converted: str | None = None) -> "Tokenizer | None":
    """The tokenizer of ``files``; None without a tokenizer.json.

    Raises:
        InputError: it cannot be read.
    """
    from tokenizers import Tokenizer

    if converted is not None:
        return Tokenizer.from_str(converted)
    if TOKENIZER not in files:
        return None
    try:
        return Tokenizer.from_file(str(files[TOKENIZER]))
    except Exception as error:  # the library has no error class of its own
        reason = str(error).splitlines()[0]
        raise InputError(f"{files[TOKENIZER]} cannot be read: {reason}; save the tokenizer again") from None


def _last_id(vocabulary: "Tokenizer | None") -> int:
    return -1 if vocabulary is None else max(vocabulary.get_vocab(with_added_tokens=True).values(), default=-1)


def _check_fit(sidecars: Sidecars, own: Files, of_base: Files, base: Checkpoint, result: Checkpoint) -> None:
    """Check that the merged model has a row for every token.

    Some published bases have tokenizers with more tokens than rows. That is not made worse, so it is not refused.
    """
    last, rows = _last_id(_vocabulary(sidecars.files, sidecars.converted)), result.sizes.vocab
    if last < rows:
        return
    if rows == base.sizes.vocab and last <= _last_id(_vocabulary(of_base)):
        return
    whose = sidecars.tokenizer_of if own else "the base"
    raise InputError(
        f"the tokenizer of {whose} has ids up to {last}, but embedding and head have {rows} rows; train with "
        "embed_tokens and lm_head in modules_to_save, or save with save_embedding_layers=True, if tokens were added, "
        "or give another one as `tokenizer`"
    )


def _without_new_tokens(sidecars: Sidecars, own: Files, base: Checkpoint, result: Checkpoint) -> Iterator[str]:
    if result.sizes.vocab > base.sizes.vocab and not own and sidecars.files:
        yield (
            f"an adapter gives the vocabulary {result.sizes.vocab} rows in place of {base.sizes.vocab}, but comes "
            "without a tokenizer that has the new tokens; give the directory of one as `tokenizer`"
        )


def _end_tokens(sidecars: Sidecars, own: Files, base: Checkpoint) -> tuple[int, ...]:
    """The end tokens of the generation settings that travel, after the one that an adapter's tokenizer itself names."""
    stored = end_tokens(base, sidecars.files.get(GENERATION_SETTINGS))
    if not any(Path(name).match(pattern) for name in own for pattern in VOCABULARIES):
        return stored
    text = _text(_settings(sidecars.files).get("eos_token") or (sidecars.settings or {}).get("eos_token"))
    vocabulary = _vocabulary(sidecars.files, sidecars.converted)
    token = vocabulary.token_to_id(text) if vocabulary is not None and isinstance(text, str) else None
    return stored if token is None or token in stored else (token, *stored)
