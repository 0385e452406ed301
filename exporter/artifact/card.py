"""The model card of a checkpoint that loads without code of its own."""

from pathlib import Path

from pos2d import __version__
from pos2d.manifest import CARD
from pos2d.recipes import BnbRecipe
from pos2d.sources.source import Source
from pos2d.spec import Rope2DSpec, spans

ONE_BRANCH = """
## One branch only

This checkpoint was made from a model with 2D RoPE, which answers several prompts as branches of one sequence: its
rotary frequencies {frequencies} of {count} encode branch and time. Here is **one branch** of it, as an ordinary
{family} model in which rope type `longrope` keeps the branch frequencies from turning. For one prompt it computes what
the trained model computes. Several branches in one sequence need pos2d, and a merged directory with 2D RoPE.
"""
LOADING = """
## How to load it

`MODEL` is the path of this directory, or its name on the Hub. transformers 4.57 and 5 load it{needs}, without
`trust_remote_code`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```
"""
SERVING = """
vLLM serves it:

```bash
vllm serve MODEL
```
"""


def write_card(
    target: Path, source: Source, dtype: str, quant: BnbRecipe | None, one_branch_of: Rope2DSpec | None
) -> None:
    """Write the card of a checkpoint of ``source`` into ``target``; equal inputs give equal bytes.

    ``dtype`` is torch's name of the type of its weights, and ``one_branch_of`` as in :class:`pos2d.manifest.Manifest`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = source.origin["base"]
    data = ModelCardData(
        base_model=base["name"] if base["revision"] else None,
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    adapters = [adapter["file"] for adapter in source.origin["adapters"]]
    weights = f"in {dtype}" if quant is None else f"quantised to {quant.name} by the formats of bitsandbytes"
    parts = [
        f"# {' + '.join([base['name'], *adapters])}\n\n",
        f"{_contents(base['name'], adapters)} The weights are {weights}.\n"
        f"pos2d {__version__} wrote it, and `manifest.json` says what it was made from.\n",
    ]
    if one_branch_of is not None:
        indices, count = sorted(one_branch_of.pair_indices), one_branch_of.num_frequencies
        parts.append(ONE_BRANCH.format(frequencies=spans(indices), count=count, family=source.base.sizes.family))
    parts.append(LOADING.format(needs="" if quant is None else ", with bitsandbytes installed"))
    if quant is None:
        parts.append(SERVING)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{''.join(parts)}").save(target / CARD)


def _contents(base: str, adapters: list[str]) -> str:
    if not adapters:
        return f"This is the model `{base}`."
    names = ", ".join(f"`{adapter}`" for adapter in adapters)
    return f"This is the model `{base}` with the LoRA adapter{'s' * (len(adapters) > 1)} {names} merged."
