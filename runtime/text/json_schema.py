"""JSON schemas that answers follow: the tokens that may come next, by the library llguidance."""

import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import Bools

# JSON without white space, of which a small model may write any amount; what llguidance cannot enforce is an error.
COMPILE_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
# A state takes 1 to 2 kB; the work of one step takes some 20 ms at most.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# llguidance has no limit on the time that it takes to compile patterns and what holds together, so a schema that has
# them is compiled in a process first that can be ended. Both are wide: most schemas take a millisecond.
SLOW_KEYWORDS = re.compile(r'"(pattern|patternProperties|allOf|multipleOf)"')
MAX_SECONDS, MAX_BYTES = 2, 2 << 30
TRIAL = """
import json, sys
text, options, limits, seconds, memory = json.load(sys.stdin)
try:
    import resource
except ImportError:
    pass
else:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
import llguidance
try:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
except ValueError:
    sys.exit()
class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([number]) for number in range(256)), b"<end>"]
    __call__ = list
vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
matcher.is_error() or matcher.compute_bitmask()
"""
# Compiled schemas that are kept, and tokens of the answer that is tried when one is compiled.
KEPT_SCHEMAS, TRIED_TOKENS = 32, 32
OWN_KEY = "x-guidance"
# llguidance's word for a place where nothing can follow.
NO_EXTENSION = "NoExtensionBias"


class JsonSchemas:
    """The schemas that were compiled for one tokenizer, of transformers; the ones used last are kept."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, schema: Mapping[str, Any]) -> None:
        """Check that answers can follow ``schema``.

        Raises:
            UsageError: a schema that is wrong, has keywords that cannot be enforced, or is too large; no llguidance.
            InputError: a tokenizer that llguidance cannot read.
        """
        self._matcher(schema)

    def constraint(self, schema: Mapping[str, Any], end_tokens: Collection[int]) -> "SchemaConstraint":
        """The constraint of one answer, which ``end_tokens`` may end where it is whole.

        Raises:
            UsageError: as :meth:`check`.
            InputError: as :meth:`check`.
        """
        matcher = self._matcher(schema)
        with self._lock:
            copied = matcher.deep_copy()
        return SchemaConstraint(copied, self._vocabulary.eos_tokens, end_tokens)

    def _matcher(self, schema: Mapping[str, Any]) -> Any:
        """A matcher at the beginning of an answer, to be copied. Nobody waits while another's schema is compiled."""
        text = _schema_text(schema)
        with self._lock:
            found = self._compiled.get(text)
        if found is None:
            found = _compiled(text, self._vocabulary)
        with self._lock:
            self._compiled[text] = found
            self._compiled.move_to_end(text)
            if len(self._compiled) > KEPT_SCHEMAS:
                self._compiled.popitem(last=False)
        return found

    @cached_property
    def _vocabulary(self) -> Any:
        _llguidance()
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer)
        except ValueError as error:
            raise InputError(f"`json_schema` cannot be used with this tokenizer: {_reason(error)}") from None


class SchemaConstraint:
    """Follows one answer; a :class:`pos2d.runtime.engine.sampler.Constraint`.

    ``matcher`` is the library's. ``its_ends`` are the end tokens that it knows, and ``end_tokens`` those of the answer.
    """

    def __init__(self, matcher: Any, its_ends: Collection[int], end_tokens: Collection[int]) -> None:
        self._matcher = matcher
        self._its_ends, self._end_tokens = list(its_ends), list(end_tokens)
        self._next = self._next_tokens()

    @property
    def is_complete(self) -> bool:
        return self._next is None

    def allowed(self, size: int) -> Bools:
        """The tokens ``[size]`` that may come next; a model may have more or fewer than the tokenizer.

        Raises:
            InputError: there is none.
        """
        allowed = np.zeros(size, dtype=np.bool_)
        if self._next is not None:
            count = min(size, len(self._next))
            allowed[:count] = self._next[:count]
        allowed[self._end_tokens] = self._next is None or self._matcher.is_accepting()
        if not allowed.any():
            raise InputError("`json_schema` has no continuation in tokens of this model; loosen it")
        return allowed

    def accept(self, token: int) -> None:
        """Add a token to the answer.

        Raises:
            InputError: the schema is too complex to be followed from here.
        """
        self._matcher.consume_token(token)
        self._next = self._next_tokens()

    def _next_tokens(self) -> Bools | None:
        """The tokens that may come next, end tokens apart; None where the answer is whole and nothing may."""
        found = _next_tokens(self._matcher, self._its_ends)
        if found is None or found.any() or not self._matcher.is_accepting():
            return found
        return None


def _next_tokens(matcher: Any, ends: list[int]) -> Bools | None:
    """The tokens that a matcher allows, without ``ends``; None where it has stopped.

    Raises:
        InputError: it has met a limit.
    """
    mask = None if matcher.is_stopped() else matcher.compute_bitmask()
    if matcher.is_error():
        raise InputError(f"`json_schema` cannot be followed any further: {_reason(matcher.get_error())}")
    if mask is None:
        return None
    allowed: Bools = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little").astype(np.bool_)
    allowed[ends] = False
    return allowed


def _compiled(text: str, vocabulary: Any) -> Any:
    """The matcher of a schema.

    Raises:
        UsageError: as :meth:`JsonSchemas.check`.
    """
    library = _llguidance()
    if SLOW_KEYWORDS.search(text):
        _check_time(text)
    try:
        grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=COMPILE_OPTIONS)
    except ValueError as error:
        raise UsageError(f"`json_schema` cannot be used: {_reason(error)}") from None
    matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise UsageError(f"`json_schema` cannot be enforced: {_reason(matcher.get_error())}")
    try:
        _try(matcher.deep_copy(), list(vocabulary.eos_tokens))
    except InputError as error:
        raise UsageError(f"{error}; a schema must allow an answer that ends") from None
    return matcher


def _check_time(text: str) -> None:
    """Check that a schema compiles in time.

    Raises:
        UsageError: it does not.
    """
    given = json.dumps([text, COMPILE_OPTIONS, LIMITS, MAX_SECONDS, MAX_BYTES])
    command = [sys.executable, "-P", "-c", TRIAL]
    # The process counts its own time, so that a busy machine refuses no more than an idle one.
    waiting = 10 * MAX_SECONDS
    try:
        subprocess.run(command, input=given, text=True, capture_output=True, check=True, timeout=waiting)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise UsageError(
            f"`json_schema` takes more than {MAX_SECONDS} s or {MAX_BYTES >> 30} GiB to compile; simplify its patterns "
            "and multiples, or what its allOf holds together"
        ) from None


def _try(matcher: Any, ends: list[int]) -> None:
    """Write the beginning of an answer: some schemas show only then that nothing fits them.

    Raises:
        InputError: nothing can follow.
    """
    for _ in range(TRIED_TOKENS):
        allowed = _next_tokens(matcher, ends)
        if allowed is None or not allowed.any():
            return
        matcher.consume_token(int(allowed.argmax()))


def _schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as JSON; the order of its keys is that of the answer's.

    Raises:
        UsageError: it is no JSON, or has settings of llguidance.
    """
    if OWN_KEY in schema:
        raise UsageError(f"`json_schema` has {OWN_KEY!r}, which pos2d sets itself; leave it out")
    try:
        text = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"`json_schema` is no JSON: {_reason(error)}") from None
    return text


def _reason(error: Any) -> str:
    """What llguidance says, without the place in a pattern and the state of the parser that it adds."""
    first, *others = str(error).splitlines() or [""]
    if first.startswith("panic"):
        return "it is too large"
    details = [line for line in others if line.startswith("error: ")]
    return "; ".join([first.rstrip(": "), *details]).replace(NO_EXTENSION, "no JSON fits it")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "`json_schema` needs the package llguidance, which is not installed; pip install 'pos2d[serve]'"
        ) from None
    return llguidance
