"""One line of a batch: what it asks, with which options, or why it cannot be answered."""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from pos2d.errors import InputError, Pos2DError
from pos2d.layout import Layout, build_layout
from pos2d.runtime.engine.sampling import Sampling, SamplingFlags, resolve_sampling
from pos2d.runtime.flags import part_of
from pos2d.runtime.text.requests import (
    Asked,
    GenerationFlags,
    LayoutFlags,
    check_heeded,
    chosen_spec,
    encode_for,
    group_size,
    lay_out,
)
from pos2d.runtime.text.tokenization import EncodedPrompts, encode, require_chat_template, template_text
from pos2d.text_samples import PAIRS, TEXTS

if TYPE_CHECKING:
    from pos2d.runtime.model.model import Model

ASKING = ("prompt", "messages", "prompts", "branches")
CONTEXTS = ("context", "main")
ECHOED = ("id", "meta")
SEPARATOR = "||"
FORMS = (
    'a line is {"prompt": ...}, {"messages": [...]}, {"context": ..., "prompts": [...]}, {"branches": [...]}, or "a||b"'
)


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line, counted from 1. ``asked`` is what to decode, ``error`` says why there is nothing; ``echoed`` is the
    user's own."""

    number: int
    echoed: Mapping[str, Any]
    asked: Asked | None = None
    error: str | None = None

    @property
    def is_ordinary(self) -> bool:
        """One branch without a context: it may stand beside others, which do not see it."""
        return self.asked is not None and len(self.asked.encoded.branches) == 1 and not self.asked.encoded.context


def read_line(
    number: int, raw: bytes, model: "Model", sampling: Sampling, flags: GenerationFlags, plain: bool = False
) -> Line:
    """``sampling`` and ``flags`` hold where the line says nothing; ``plain`` takes what is not JSON as a prompt."""
    echoed: dict[str, Any] = {}
    try:
        block = _block(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, plain)
        echoed = _echoed(block)
        return Line(number, echoed, asked=_asked(block, model, sampling, flags))
    except Pos2DError as error:
        return Line(number, echoed, error=" ".join(str(error).split()))


def _block(raw: bytes, plain: bool) -> dict[str, Any]:
    """The line as an object; ``a||b``, in quotes or bare, is a list of branches."""
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"not text in UTF-8: {error}") from None
    if not text:
        raise InputError(f"the line is empty; {FORMS}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError("the JSON is too deep") from None
    except ValueError:
        value = text if (plain or SEPARATOR in text) and not text.startswith(("{", "[")) else None
    if isinstance(value, str):
        value = {"branches": [part.strip() for part in value.split(SEPARATOR)]}
    if not isinstance(value, dict):
        raise InputError(f"neither an object of JSON nor a text with {SEPARATOR}; {FORMS}")
    return value


def _echoed(block: Mapping[str, Any]) -> dict[str, Any]:
    """Raises:
    InputError: what cannot stand in a file of JSON again.
    """
    echoed = {name: block[name] for name in ECHOED if name in block}
    try:
        json.dumps(echoed, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise InputError(f"{' or '.join(echoed)} cannot be written again: NaN, Infinity, or half a character") from None
    return echoed


def _asked(block: Mapping[str, Any], model: "Model", sampling: Sampling, flags: GenerationFlags) -> Asked:
    said = _options(block)
    # An artifact's settings are in `sampling` already; the line's own win over all of them.
    own = resolve_sampling(model.path, part_of(SamplingFlags, said), below=asdict(sampling))
    check_heeded(chosen_spec(model.manifest.rope_2d, flags), part_of(LayoutFlags, said))
    place = {**flags, **part_of(LayoutFlags, said)}
    spec = chosen_spec(model.manifest.rope_2d, cast(LayoutFlags, place))
    asking = [name for name in ASKING if name in block]
    if len(asking) != 1:
        raise InputError(f"a line has one of {', '.join(ASKING)}; {FORMS}")
    context = _context(block)
    ignored = bool(flags.get("ignore_chat_template"))
    if asking == ["messages"]:
        if context is not None:
            raise InputError("messages has its own system turn; put the context there")
        if ignored:
            raise InputError("messages are turns of the chat template; use prompt, or leave --ignore-chat-template out")
        encoded = _conversation(block["messages"], model)
    else:
        prompts = _prompts(block[asking[0]], asking[0])
        encoded = encode_for(model.tokenizer, prompts, context, spec, ignored)
    return lay_out(model, encoded, spec, own, group_size(cast(LayoutFlags, place)))


def _options(block: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling and layout options of a line, as the flags of the command line would be."""
    known = set(GenerationFlags.__annotations__) - {"ignore_chat_template"}
    unknown = sorted(set(block) - known - {*ASKING, *CONTEXTS, *ECHOED})
    if unknown:
        raise InputError(f'{", ".join(unknown)} is no option; what is your own may stand under "id" and "meta"')
    said = {name: block[name] for name in known if name in block}
    for name in ("branch_stride", "max_branches"):
        if said.get(name) is not None and not (isinstance(said[name], int) and not isinstance(said[name], bool)):
            raise InputError(f"{name} {said[name]!r} must be a whole number")
    return said


def _context(block: Mapping[str, Any]) -> str | None:
    found = [block[name] for name in CONTEXTS if block.get(name) is not None]
    if len(found) > 1 or not all(isinstance(context, str) for context in found):
        raise InputError("the context must be one text")
    return found[0] if found else None


def _prompts(value: Any, key: str) -> list[str]:
    entries = [value] if key == "prompt" else value
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{key} must be a list of texts; {FORMS}")
    return [_prompt(entry, key) for entry in entries]


def _prompt(entry: Any, key: str) -> str:
    """A text, or of the trainer's samples the part that is asked."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping) and key == "branches":
        for name in (*(question for question, _ in PAIRS), *TEXTS):
            if isinstance(entry.get(name), str):
                return str(entry[name])
    raise InputError(f"{key} has {entry!r}, which is not a text")


def _conversation(messages: Any, model: "Model") -> EncodedPrompts:
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise InputError("messages must be a list of turns, each with a role and a content")
    require_chat_template(model.tokenizer)
    return EncodedPrompts([encode(model.tokenizer, template_text(model.tokenizer, turns, ask=True))], None)


def side_by_side(lines: Sequence[Line], model: "Model") -> Layout:
    """Ordinary lines as branches of one sequence that do not see each other; each is answered as if it were alone."""
    branches = [line.asked.encoded.branches[0] for line in lines if line.asked is not None]
    return build_layout(branches, model.manifest.rope_2d, visibility="isolated")
