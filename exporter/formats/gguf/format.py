"""One GGUF file, as llama.cpp and what is built on it read it, and a Modelfile for Ollama beside it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from pos2d import __version__
from pos2d.dtypes import SAFETENSORS_NAMES
from pos2d.errors import UsageError
from pos2d.exporter.formats.gguf.architecture import Architecture, add_settings, choose_architecture
from pos2d.exporter.formats.gguf.modelfile import FILE_NAME, modelfile
from pos2d.exporter.formats.gguf.reading import compare_file
from pos2d.exporter.formats.gguf.vocabulary import Vocabulary, open_tokenizer, read_vocabulary
from pos2d.exporter.formats.gguf.weights import BLOCK_BYTES, FloatKind, GgufTensor, data_bytes, lay_out, write_file
from pos2d.exporter.formats.options import ExportOptions
from pos2d.exporter.quantisation.module_names import named_modules
from pos2d.exporter.quantisation.summary import rounding_totals, summarise
from pos2d.manifest import sum_of_names
from pos2d.recipes import GGUF_BLOCK, GgufQuant, GgufRecipe
from pos2d.sources.sidecars.sidecars import GENERATION_SETTINGS, read_settings
from pos2d.sources.source import Source
from pos2d.sources.tensors.tensor_plan import plan_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPTIONS = ("quant", "skip_modules", "dtype", "no_verify")
# llama.cpp's usual type where the type of each weight is not to be kept.
DEFAULT_DTYPE = "float16"
NO_TOKENIZER = "the model has no tokenizer, so the GGUF file takes token ids only, and there is no chat template in it"
ONE_BRANCH = "One branch of a model with 2D RoPE, made by pos2d {version}; several branches in one sequence need pos2d."


@dataclass(frozen=True, slots=True, eq=False)
class GgufPlan:
    """What is written into ``file``. ``dtype``: torch's name of the type of matrices that are not quantised."""

    file: str
    architecture: Architecture
    tensors: tuple[GgufTensor, ...]
    recipe: GgufRecipe | None
    dtype: str
    tokenizer: "PreTrainedTokenizerFast | None"
    vocabulary: Vocabulary | None
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return data_bytes(self.tensors)


def refuse(options: ExportOptions) -> None:
    """Check that ``quant`` is a type of llama.cpp, that there are layers to skip, and that the package is there.

    Raises:
        UsageError: it is not.
    """
    known = ("none", *get_args(GgufQuant))
    if options.quant not in known:
        raise UsageError(f"`format='gguf'` takes `quant` {', '.join(known)}; `quant={options.quant!r}` is of another")
    if options.quant == "none" and options.skip_modules is not None:
        raise UsageError("`skip_modules` names layers that are not quantised; give `quant` as well, or leave it out")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError("`format='gguf'` needs the package gguf; install it with: pip install 'pos2d[gguf]'") from None


def plan(source: Source, options: ExportOptions) -> GgufPlan:
    """Choose llama.cpp's graph, read the tokenizer, and lay out the file.

    Raises:
        UsageError: modules that do not exist or leave nothing to quantise.
        InputError: a model or a tokenizer that llama.cpp cannot have.
    """
    dtype = DEFAULT_DTYPE if options.dtype == "auto" else options.dtype
    merged = plan_tensors(source.base, source.adapters, dtype)
    architecture = choose_architecture(source, merged.tied)
    tokenizer = open_tokenizer(source)
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer, source)
    recipe = None
    if options.quant != "none":
        skipped = named_modules(options.skip_modules or "", list(source.base.linear_shapes()), "`skip_modules`")
        recipe = GgufRecipe(cast(GgufQuant, options.quant), skipped)
    kind = cast(FloatKind, SAFETENSORS_NAMES[dtype])
    tensors = lay_out(merged, source.base.sizes, architecture, recipe, kind)
    if recipe is not None and not any(tensor.kind in BLOCK_BYTES for tensor in tensors):
        raise UsageError(
            f"`quant={options.quant!r}` leaves nothing to quantise: it needs layers with a multiple of {GGUF_BLOCK} "
            "inputs that `skip_modules` does not name"
        )
    notes = (NO_TOKENIZER,) if vocabulary is None else vocabulary.notes
    label = kind if recipe is None else recipe.name.upper()
    return GgufPlan(f"model-{label}.gguf", architecture, tensors, recipe, dtype, tokenizer, vocabulary, notes)


def write(source: Source, plan: GgufPlan, target: Path) -> dict[str, Any]:
    """Write the file and the Modelfile into ``target``; returns the manifest's fields for them.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    positions = source.one_branch_facts
    writer = GGUFWriter(None, plan.architecture.name)
    writer.add_type("model")
    writer.add_name(sum_of_names(source.origin["base"], source.origin["adapters"]))
    if positions["one_branch_of"] is not None:
        writer.add_description(ONE_BRANCH.format(version=__version__))
    add_settings(writer, source.base.sizes, plan.architecture)
    most = SAFETENSORS_NAMES[plan.dtype] if plan.recipe is None else plan.recipe.name.upper()
    writer.add_file_type(LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"])
    if plan.recipe is not None:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    if plan.vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        plan.vocabulary.add_to(writer)
    tallies = write_file(writer, target / plan.file, plan.tensors, plan.architecture, source)
    settings = target / GENERATION_SETTINGS
    text = modelfile(
        plan.file,
        plan.vocabulary,
        plan.tokenizer,
        source.eos_token_ids,
        source.base.sizes.context_length,
        read_settings(settings) if settings.is_file() else {},
    )
    (target / FILE_NAME).write_text(text, encoding="utf-8")
    count = len(plan.tensors)
    totals = rounding_totals(tallies, count) if plan.recipe is None else asdict(summarise(tallies, count))
    return {
        "dtype": plan.dtype,
        "quant": plan.recipe,
        "ledger": {"totals": totals},
        **positions,
    }


def check(staging: Path, source: Source, plan: GgufPlan) -> Mapping[str, Any]:
    """Read the file back and compare all of it with the exact sums, the positions and the tokenizer.

    Raises:
        ParityError: a value is further off than its type rounds, or something is missing.
    """
    return compare_file(staging / plan.file, source, plan.tensors, plan.architecture, plan.vocabulary)
