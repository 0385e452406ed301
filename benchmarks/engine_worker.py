"""One engine with one model: loads it, then answers requests, a JSON line each, until its input ends. For any python.

First it says ``{"version", "load_s"}``. Then a request is one of these, always greedy:

- ``{"ids", "new"}``: so many tokens after the ids, past end tokens; ``{"tokens", "seconds"}``
- ``{"messages", "new"}``: the engine's own chat template and end tokens; ``{"ids", "tokens", "stopped"}``
- ``{"text"}``: the ids of the engine's own tokenizer; ``{"ids"}``
- ``{"ids", "of"}``: what the logits after the ids give two or more tokens, of ours alone; ``{"logits"}``
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

Messages = Sequence[dict[str, str]]
# Nobody is asked for anything over the network; gigabytes of vLLM's cache.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class Engine(Protocol):
    """A loaded model; ``package`` is the distribution whose version is told."""

    package: str

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text, with the special tokens that this engine puts around one."""

    def render(self, messages: Messages) -> list[int]:
        """The ids of a conversation whose next message is the assistant's."""

    def generate(self, ids: list[int], new: int, past_end: bool) -> list[int]:
        """Up to ``new`` tokens; with ``past_end`` exactly so many, else up to an end token, which comes last or not."""

    def ends(self) -> set[int]:
        """The end tokens that this engine knows."""


class Transformers:
    """``generate`` of transformers on torch in float32."""

    package = "transformers"

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._end = self._model.generation_config.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def render(self, messages: Messages) -> list[int]:
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return list(self._tokenizer.apply_chat_template(messages, **settings)["input_ids"])

    def generate(self, ids: list[int], new: int, past_end: bool) -> list[int]:
        self._model.generation_config.eos_token_id = None if past_end else self._end
        given = self._torch.tensor([ids])
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with self._torch.inference_mode():
            found = self._model.generate(given, attention_mask=self._torch.ones_like(given), **settings)
        return [int(token) for token in found[0, len(ids) :]]

    def ends(self) -> set[int]:
        return set(self._end if isinstance(self._end, list) else [self._end])


class Vllm:
    """vLLM on the CPU, in float32 and without compilation."""

    package = "vllm-cpu"

    def __init__(self, path: Path, threads: int) -> None:
        from vllm import LLM

        options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 1, "max_model_len": 2048}
        self._model = LLM(model=str(path), **options)

    def encode(self, text: str) -> list[int]:
        return list(self._model.get_tokenizer().encode(text))

    def render(self, messages: Messages) -> list[int]:
        return list(self._chat(messages).prompt_token_ids)

    def generate(self, ids: list[int], new: int, past_end: bool) -> list[int]:
        settings = self._settings(new, past_end)
        return list(self._model.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)[0].outputs[0].token_ids)

    def ends(self) -> set[int]:
        config = self._model.llm_engine.model_config
        given = config.try_get_generation_config().get("eos_token_id", ())
        return {self._model.get_tokenizer().eos_token_id, *(given if isinstance(given, list) else [given])}

    def _chat(self, messages: Messages) -> Any:
        return self._model.chat(list(messages), self._settings(1, True), use_tqdm=False)[0]

    def _settings(self, new: int, past_end: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=past_end)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, whose chat renders the template in the file. Its own KV cache has 16 bits."""

    package = "llama-cpp-python"

    def __init__(self, path: Path, threads: int, bits: int) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._lib = llama_cpp
        (file,) = [path] if path.is_file() else path.glob("*.gguf")
        kind = llama_cpp.GGML_TYPE_F32 if bits == 32 else llama_cpp.GGML_TYPE_F16
        options = {"n_ctx": 2048, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        options |= {"type_k": kind, "type_v": kind}
        self._model = llama_cpp.Llama(str(file), **options)
        template = self._model.metadata["tokenizer.chat_template"]
        self._format = Jinja2ChatFormatter(
            template, eos_token=self._text(self._model.token_eos()), bos_token=self._text(self._model.token_bos())
        )

    def encode(self, text: str) -> list[int]:
        return list(self._model.tokenize(text.encode()))

    def render(self, messages: Messages) -> list[int]:
        found = self._format(messages=list(messages))
        return list(self._model.tokenize(found.prompt.encode(), add_bos=not found.added_special, special=True))

    def generate(self, ids: list[int], new: int, past_end: bool) -> list[int]:
        self._model.reset()
        tokens = self._model.generate(ids, temp=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        return _cut(islice(tokens, new), set() if past_end else self.ends())

    def ends(self) -> set[int]:
        vocabulary = self._model._model.vocab
        return {token for token in range(self._model.n_vocab()) if self._lib.llama_vocab_is_eog(vocabulary, token)}

    def _text(self, token: int) -> str:
        return self._model._model.token_get_text(token) if token >= 0 else ""


class Genai:
    """onnxruntime-genai, with its own tokenizer and chat template."""

    package = "onnxruntime-genai"

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai

        self._lib = onnxruntime_genai
        self._path, self._threads = path, threads
        self._model = self._load({})
        # There is always an end token. The last of a vocabulary is hardly ever said; if it is, an answer is too short.
        self._endless = self._load({"eos_token_id": self._facts()["vocab_size"] - 1})
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def render(self, messages: Messages) -> list[int]:
        return self.encode(self._tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    def generate(self, ids: list[int], new: int, past_end: bool) -> list[int]:
        model = self._endless if past_end else self._model
        settings = self._lib.GeneratorParams(model)
        settings.set_search_options(max_length=len(ids) + new, do_sample=False)
        generator = self._lib.Generator(model, settings)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]

    def ends(self) -> set[int]:
        given = self._facts()["eos_token_id"]
        return set(given if isinstance(given, list) else [given])

    def _facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._path / "genai_config.json").read_text(encoding="utf-8"))["model"]
        return found

    def _load(self, model: dict[str, Any]) -> Any:
        config = self._lib.Config(str(self._path))
        session = {"session_options": {"intra_op_num_threads": self._threads}}
        config.overlay(json.dumps({"model": {"decoder": session} | model}))
        return self._lib.Model(config)


class Ours:
    """Our runtime; its version is that of the code that this file belongs to."""

    package = "pos2d"

    def __init__(self, path: Path, threads: int) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from pos2d import runtime

        self._model = runtime.load(path, threads=threads)

    def encode(self, text: str) -> list[int]:
        from pos2d.runtime.text.tokenization import encode

        return list(encode(self._model.tokenizer, text, True))

    def render(self, messages: Messages) -> list[int]:
        from pos2d.runtime.text.chat_template import render_for_answer
        from pos2d.runtime.text.tokenization import encode

        return list(encode(self._model.tokenizer, render_for_answer(self._model.tokenizer, messages), False))

    def generate(self, ids: list[int], new: int, past_end: bool) -> list[int]:
        return self._model.generate_ids([ids], max_new_tokens=new, ignore_eos=past_end)[0]

    def ends(self) -> set[int]:
        return set(self._model.manifest.eos_token_ids)

    def logits(self, ids: list[int], of: list[int]) -> list[float]:
        last = self._model.logits(ids)[0, -1]
        return [float(last[token]) for token in of]


ENGINES: dict[str, type[Engine]] = {
    "transformers": Transformers,
    "vllm": Vllm,
    "llama": LlamaCpp,
    "genai": Genai,
    "ours": Ours,
}


def _cut(tokens: Iterable[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token, with it."""

    def walk() -> Iterator[int]:
        for token in tokens:
            yield token
            if token in ends:
                return

    return list(walk())


def answer(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What the engine replies to one request."""
    if "text" in asked:
        return {"ids": engine.encode(asked["text"])}
    if "of" in asked:
        return {"logits": engine.logits(asked["ids"], asked["of"])}
    if "messages" in asked:
        ids = engine.render(asked["messages"])
        tokens = engine.generate(ids, asked["new"], False)
        ends = engine.ends()
        kept = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return {"ids": ids, "tokens": kept, "stopped": len(tokens) < asked["new"] or kept != tokens}
    started = time.perf_counter()
    tokens = engine.generate(asked["ids"], asked["new"], True)
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("engine", choices=ENGINES)
    arguments.add_argument("path", type=Path)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--bits", type=int, choices=(16, 32), default=32, help="Of llama.cpp's KV cache.")
    arguments.add_argument("--site", help="A directory of packages that go before those of this python.")
    given = arguments.parse_args()
    if given.site:
        sys.path.insert(0, given.site)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    started = time.perf_counter()
    kind = ENGINES[given.engine]
    options = {"bits": given.bits} if kind is LlamaCpp else {}
    engine = kind(given.path, given.threads, **options)  # type: ignore[call-arg]
    replies.write(json.dumps({"version": version(kind.package), "load_s": time.perf_counter() - started}) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer(engine, json.loads(line))) + "\n")


if __name__ == "__main__":  # vLLM starts its engine as a process that imports this file
    main()
