"""What the installed transformers computes from directories, without code of their own; also run as a program."""

import json
import sys
from pathlib import Path
from typing import Any

TOKENS = 24


def computed(given: dict[str, Any], logits: Path) -> dict[str, list[int]]:
    """Greedy tokens by name, of directories and prompts ``[1, S]``; the logits of the prompts go into a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    found, tokens = {}, {}
    for name, (directory, prompt) in given.items():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ids = torch.tensor(prompt)
        with torch.no_grad():
            found[name] = model(ids).logits
            options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            tokens[name] = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    save_file(found, logits)
    return tokens


if __name__ == "__main__":
    import transformers

    report = {"tokens": computed(json.loads(sys.argv[1]), Path(sys.argv[2]))}
    print(json.dumps({"version": transformers.__version__, **report}))
