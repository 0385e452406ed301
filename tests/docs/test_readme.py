"""Every command of the README, run as it stands there on the real demo model."""

import subprocess
import sys
from pathlib import Path

from tests.docs.pages import GIVEN, blocks, run

# One branch of the demo model in plain transformers: of 256 greedy tokens of ours, it would have written each.
ONE_BRANCH = """
import pos2d, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("my/stock"), AutoTokenizer.from_pretrained("my/stock")
question = [{"role": "user", "content": "What is a volcano?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
answer = list(pos2d.load("my/onnx").generate("What is a volcano?", max_new_tokens=256)[0].token_ids)
with torch.no_grad():
    logits = model(torch.tensor([prompt + answer])).logits[0]
assert len(answer) == 256
assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
assert type(model).__name__ == "LlamaForCausalLM"
"""


def test_commands_and_then_python(workplace: Path) -> None:
    """The shell block first: the Python blocks use what it makes."""
    printed = (workplace / "printed").read_text(encoding="utf-8")
    assert "[2] What does a baker do?" in printed
    assert printed.rstrip().endswith("passed")

    plain, library = blocks("python")
    done = run(workplace, [sys.executable, "-c", ONE_BRANCH])
    assert done.returncode == 0, done.stderr
    subprocess.run(["rm", "-r", "my/onnx"], cwd=workplace, check=True)
    merged_anew = library.replace('"my/merged"', '"my/merged2"')
    for program in (GIVEN + plain.replace("generate(input_ids)", "generate(input_ids, max_new_tokens=3)"), merged_anew):
        done = run(workplace, [sys.executable, "-c", program])
        assert done.returncode == 0, done.stderr
