"""How each kind of artifact is run: the part of its model card that names programs and commands."""

from pos2d.manifest import Manifest

DOWNLOADED = """
`MODEL` is this directory. From the Hub, `hf download ORG/NAME --local-dir MODEL` makes it.
"""
ANYWHERE = """
`MODEL` is the path of this directory, or its name on the Hub.
"""
BRANCHES = """
pos2d answers one prompt, or several at the same time, {how}:

```sh
pos2d run MODEL --prompt "What is tea?"
pos2d run MODEL --prompt "What is tea?" --prompt "What is snow?"
pos2d serve MODEL
```
"""
REMOTE_CODE = """
transformers 4.57 and 5 load it{needs}, with the code in this directory. Without the argument `pos2d`, which is
`[batch, sequence, 2]` and has branch and time, the input is one sequence, and `generate` always writes one:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("MODEL", trust_remote_code=True)
```
"""
TRANSFORMERS = """
transformers 4.57 and 5 load it{needs}, without `trust_remote_code`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```
"""
VLLM = """
vLLM serves it:

```sh
vllm serve MODEL
```
"""
GRAPHS = """
For a program of your own: beside `input_ids` the graphs take `position_ids`, and `pos2d`, which is
`[batch, sequence, 2]` and has branch and time. `manifest.json` names all their inputs and outputs.
"""
LLAMA_CPP = """
llama.cpp and the programs that are built on it run it:

```sh
llama-cli -m MODEL/{file}
llama-server -m MODEL/{file}
```
"""
OLLAMA = """
Ollama takes the template and the stop tokens from `Modelfile`:

```sh
cd MODEL
ollama create NAME -f Modelfile
ollama run NAME
```
"""
GENAI = """
onnxruntime-genai runs it:

```python
import onnxruntime_genai as og

model = og.Model("MODEL")
tokenizer = og.Tokenizer(model)
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=256, do_sample=False)
generator = og.Generator(model, settings)
{prompt}generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""
TEMPLATED = """messages = '[{"role": "user", "content": "What is tea?"}]'
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
"""
UNTEMPLATED = 'prompt = "What is tea?"\n'
MODELFILE, TEMPLATE = "Modelfile", "chat_template.jinja"


def usage(manifest: Manifest) -> str:
    """The programs that run an artifact of this kind, with a command or a few lines for each."""
    needs = ", with bitsandbytes installed" if manifest.quant is not None else ""
    kind: str = manifest.kind
    if kind == "gguf":
        file = next(name for name in sorted(manifest.files) if name.endswith(".gguf"))
        return DOWNLOADED + LLAMA_CPP.format(file=file) + (OLLAMA if MODELFILE in manifest.files else "")
    if kind == "genai":
        return DOWNLOADED + GENAI.format(prompt=TEMPLATED if TEMPLATE in manifest.files else UNTEMPLATED)
    is_2d = manifest.rope_2d.is_2d
    ours = BRANCHES.format(how="as branches of one sequence" if is_2d else "that do not see each other")
    if kind == "onnx":
        return DOWNLOADED + ours + GRAPHS
    if is_2d:
        return DOWNLOADED + ours + REMOTE_CODE.format(needs=needs)
    if needs:  # the name of a quantised artifact on the Hub is not for pos2d
        return DOWNLOADED + TRANSFORMERS.format(needs=needs) + ours
    return ANYWHERE + TRANSFORMERS.format(needs=needs) + VLLM + ours
