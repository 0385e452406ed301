"""Many prompts over one context: laid out in as many sequences as they need, the context read once."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from pos2d.errors import UsageError
from pos2d.layout import Layout, build_layout
from pos2d.runtime.engine.prefix_cache import Prefix
from pos2d.runtime.engine.sampling import Sampling, SamplingFlags, resolve_sampling
from pos2d.runtime.engine.sequence import check_length
from pos2d.runtime.flags import check_known, part_of
from pos2d.runtime.text.completions import Event, answer, end_token_ids
from pos2d.runtime.text.tokenization import EncodedPrompts, encode_prompts
from pos2d.spec import Align, Rope2DSpec, Visibility

if TYPE_CHECKING:
    from pos2d.runtime.model.model import Model

MAX_BRANCHES = 16


class LayoutFlags(TypedDict, total=False):
    """How prompts stand side by side, None for what the artifact was trained with.

    ``visibility``: whether they see each other's earlier columns (``columnar``) or each only itself (``isolated``).
    ``align_to``: where prompts of different length line up. ``branch_stride``: branch value between neighbours.
    ``max_branches``: prompts of one sequence; more wait for the next one, over the same context.
    """

    visibility: Visibility | None
    align_to: Align | None
    branch_stride: int | None
    max_branches: int | None


class GenerationFlags(SamplingFlags, LayoutFlags, total=False):
    """The options of an answer and of its place; ``ignore_chat_template`` takes texts as they are."""

    ignore_chat_template: bool


def chosen_spec(spec: Rope2DSpec, flags: LayoutFlags) -> Rope2DSpec:
    """The artifact's positions, but for what the flags say.

    Raises:
        InputError: a value out of range.
    """
    said: dict[str, Any] = {name: flags.get(name) for name in ("visibility", "align_to", "branch_stride")}
    return replace(spec, **{name: value for name, value in said.items() if value is not None})


def check_heeded(spec: Rope2DSpec, flags: LayoutFlags) -> None:
    """``spec`` is the artifact's.

    Raises:
        UsageError: a flag that would change nothing here.
    """
    if flags.get("branch_stride") is not None and not spec.is_2d:
        raise UsageError("--branch-stride does nothing in an artifact without 2D RoPE; leave it out")
    if flags.get("align_to") is not None and (flags.get("visibility") or spec.visibility) == "isolated":
        raise UsageError("--align-to moves nothing where prompts are isolated; leave it out, or add columnar")


def group_size(flags: LayoutFlags) -> int:
    """Raises:
    UsageError: less than one branch.
    """
    size = flags.get("max_branches")
    if size is not None and size < 1:
        raise UsageError(f"max_branches {size} must be at least 1")
    return size or MAX_BRANCHES


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Prompts that were checked: at most ``size`` of them stand in one sequence, after their context."""

    encoded: EncodedPrompts
    layouts: tuple[Layout, ...]
    spec: Rope2DSpec
    sampling: Sampling
    size: int

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.encoded.branches)) + len(self.encoded.context or ())


def prepare(model: "Model", prompts: Sequence[str], context: str | None, flags: GenerationFlags) -> Asked:
    """Everything that can be wrong with :meth:`pos2d.runtime.Model.stream` is found here."""
    check_known(GenerationFlags, flags)
    sampling = resolve_sampling(model.path, part_of(SamplingFlags, flags))
    check_heeded(model.manifest.rope_2d, flags)
    spec = chosen_spec(model.manifest.rope_2d, flags)
    encoded = encode_for(model.tokenizer, prompts, context, spec, bool(flags.get("ignore_chat_template")))
    return lay_out(model, encoded, spec, sampling, group_size(flags))


def encode_for(
    tokenizer: Any, prompts: Sequence[str], context: str | None, spec: Rope2DSpec, ignore_chat_template: bool
) -> EncodedPrompts:
    """Token ids of prompts that will stand as ``spec`` says; see
    :func:`pos2d.runtime.text.tokenization.encode_prompts`."""
    return encode_prompts(
        tokenizer,
        prompts,
        context,
        chat=bool(tokenizer.chat_template) and not ignore_chat_template,
        ordinary=len(prompts) == 1 or spec.visibility == "isolated",
    )


def lay_out(model: "Model", encoded: EncodedPrompts, spec: Rope2DSpec, sampling: Sampling, size: int) -> Asked:
    """Raises:
    InputError: a sequence that is longer than the model.
    UsageError: an end token that the tokenizer does not have.
    """
    end_token_ids(model.tokenizer, sampling)
    firsts = range(0, len(encoded.branches), size)
    layouts = tuple(build_layout(encoded.branches[first : first + size], spec, encoded.context) for first in firsts)
    for layout in layouts:
        model.check_ids(layout.ids)
        check_length(layout, model.manifest.context_length)
    return Asked(encoded, layouts, spec, sampling, size)


def stream(model: "Model", asked: Asked, prefix: Prefix | None = None, turn: Sequence[int] = ()) -> Generator[Event]:
    """One sequence after the other; the context is read once and stays in ``prefix``.

    Random numbers are those of ``turn`` and the branch.
    """
    context = asked.encoded.context or []
    model.backend.expect_branches(max(len(layout.last) for layout in asked.layouts))
    prefix = prefix or Prefix(model.backend, asked.spec, model.manifest.context_length)
    first = 0
    for layout in asked.layouts:
        prefix.become(context)
        branches = range(first, first + len(layout.last))
        streams = [(*turn, branch) for branch in branches]
        samplings = [asked.sampling] * len(branches)
        for event in answer(model, layout, samplings, streams, prefix.cache, len(context)):
            yield replace(event, branch=branches[event.branch])
        first = branches.stop
