"""One peer with one model: loads it, then answers requests, a JSON line each, until its input ends. For any python.

First it says what loading took: ``{"import_s", "load_s", "first_token_s"}``, the last from the begin of loading to the
first token after 16. Then ``{"prompt": P, "new": G, "answers": N, "seed": S}`` gives ``{"prefill_s", "step_ms",
"tok_s", "total_s"}`` of N answers of G tokens each, greedy, after the same P random ids: the first token of each comes
out of the prompt, the others are the steps. And ``{"ids": [...], "save": FILE}`` saves logits ``[S, V]``.
"""

import argparse
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Ids that every vocabulary here has, behind the special ones.
LOWEST, HIGHEST = 100, 30000
FIRST_PROMPT = 16


class Peer(Protocol):
    """A loaded model."""

    def answer(self, prompt: list[int], answers: int, new: int) -> tuple[float, float]:
        """Seconds until every answer has its first token, and until all have ``new``."""

    def logits(self, ids: list[int]) -> Any:
        """Float32 ``[S, V]``."""


class Llama:
    """llama.cpp, where answers are sequences that share the cells of their prompt."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def answer(self, prompt: list[int], answers: int, new: int) -> tuple[float, float]:
        context, batch = self._open(len(prompt), answers, new)
        everyone = list(range(answers))
        for place, token in enumerate(prompt):
            _put(batch, place, token, place, everyone, place == len(prompt) - 1)
        started = time.perf_counter()
        self._decode(context, batch, len(prompt))
        tokens = [self._greedy(context, len(prompt) - 1)] * answers
        first = time.perf_counter() - started
        for step in range(new - 1):
            for answer in everyone:
                _put(batch, answer, tokens[answer], len(prompt) + step, [answer], True)
            self._decode(context, batch, answers)
            tokens = [self._greedy(context, answer) for answer in everyone]
        total = time.perf_counter() - started
        self._close(context, batch)
        return first, total

    def logits(self, ids: list[int]) -> Any:
        context, batch = self._open(len(ids), 1, 1)
        for place, token in enumerate(ids):
            _put(batch, place, token, place, [0], True)
        self._decode(context, batch, len(ids))
        rows = np.stack([self._row(context, place) for place in range(len(ids))])
        self._close(context, batch)
        return rows

    def _open(self, prompt: int, answers: int, new: int) -> tuple[Any, Any]:
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = prompt + answers * new
        settings.n_batch = max(512, prompt)
        settings.n_seq_max, settings.kv_unified = answers, True
        settings.n_threads = settings.n_threads_batch = self._threads
        context = self._lib.llama_init_from_model(self._model, settings)
        return context, self._lib.llama_batch_init(max(prompt, answers), 0, answers)

    def _close(self, context: Any, batch: Any) -> None:
        self._lib.llama_batch_free(batch)
        self._lib.llama_free(context)

    def _decode(self, context: Any, batch: Any, count: int) -> None:
        batch.n_tokens = count
        if self._lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _row(self, context: Any, place: int) -> Any:
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(context, place), (self._vocabulary,))

    def _greedy(self, context: Any, place: int) -> int:
        return int(self._row(context, place).argmax())


def _put(batch: Any, place: int, token: int, position: int, sequences: list[int], wanted: bool) -> None:
    batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
    batch.n_seq_id[place] = len(sequences)
    for number, sequence in enumerate(sequences):
        batch.seq_id[place][number] = sequence


class Genai:
    """onnxruntime-genai; answers are a batch."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai

        self._lib = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)

    def answer(self, prompt: list[int], answers: int, new: int) -> tuple[float, float]:
        generator = self._generator(answers, len(prompt) + new)
        started = time.perf_counter()
        generator.append_tokens(np.array([prompt] * answers, dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter() - started
        for _ in range(new - 1):
            generator.generate_next_token()
        return first, time.perf_counter() - started

    def logits(self, ids: list[int]) -> Any:
        generator = self._generator(1, len(ids) + 1)
        generator.append_tokens(ids)
        return np.asarray(generator.get_output("logits"))[0]

    def _generator(self, answers: int, length: int) -> Any:
        settings = self._lib.GeneratorParams(self._model)
        settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=answers)
        return self._lib.Generator(self._model, settings)


class OpenVino:
    """openvino-genai; answers are the return sequences of one prompt, which it reads once."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino
        import openvino_genai

        self._core, self._lib, self._path = openvino, openvino_genai, path
        self._options = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.LLMPipeline(str(path), "CPU", **self._options)

    def answer(self, prompt: list[int], answers: int, new: int) -> tuple[float, float]:
        ids = np.array([prompt], dtype=np.int64)
        settings = self._lib.GenerationConfig()
        settings.max_new_tokens = settings.min_new_tokens = new
        settings.ignore_eos = True
        # Several sequences have to be sampled; from one token this is greedy.
        settings.do_sample, settings.top_k, settings.num_return_sequences = answers > 1, 1, answers
        inputs = self._lib.TokenizedInputs(self._core.Tensor(ids), self._core.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        found = self._pipeline.generate(inputs, settings)
        total = time.perf_counter() - started
        return found.perf_metrics.get_ttft().mean / 1e3, total

    def logits(self, ids: list[int]) -> Any:
        """Of the same files on the runtime beneath, since the pipeline keeps them to itself."""
        model = self._core.Core().compile_model(self._path / "openvino_model.xml", "CPU", self._options)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
        feeds |= {"position_ids": np.arange(len(ids))[None], "beam_idx": np.zeros(1, dtype=np.int32)}
        return np.array(model(feeds)["logits"])[0]


class Transformers:
    """transformers' own ``generate`` on torch; answers are a batch."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def answer(self, prompt: list[int], answers: int, new: int) -> tuple[float, float]:
        stamps: list[float] = []

        def note(ids: Any, scores: Any) -> Any:
            stamps.append(time.perf_counter())
            return scores

        ids = self._torch.tensor([prompt] * answers)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        started = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(ids, attention_mask=self._torch.ones_like(ids), logits_processor=[note], **settings)
        return stamps[0] - started, time.perf_counter() - started

    def logits(self, ids: list[int]) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids])).logits[0].float().numpy()


PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Peer]]] = {
    "llama": (("llama_cpp",), Llama),
    "genai": (("onnxruntime_genai",), Genai),
    "openvino": (("openvino", "openvino_genai"), OpenVino),
    "transformers": (("torch", "transformers"), Transformers),
}


def drawn(count: int, seed: int) -> list[int]:
    """The same ids for everybody; fresh ones for every seed, since some keep what they have read."""
    draw = random.Random(seed)
    return [draw.randrange(LOWEST, HIGHEST) for _ in range(count)]


def serve(modules: tuple[str, ...], load: Callable[[], Peer]) -> None:
    """Import, load, and answer until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    began = time.perf_counter()
    for module in modules:
        importlib.import_module(module)
    started = time.perf_counter()
    peer = load()
    loaded = time.perf_counter()
    peer.answer(drawn(FIRST_PROMPT, -1), 1, 1)
    facts = {"import_s": started - began, "load_s": loaded - started, "first_token_s": time.perf_counter() - started}
    replies.write(json.dumps(facts) + "\n")
    warm: set[tuple[int, int]] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "ids" in asked:
            np.save(asked["save"], peer.logits(asked["ids"]))
            replies.write(json.dumps({"saved": asked["save"]}) + "\n")
            continue
        prompt, answers, new = asked["prompt"], asked["answers"], asked["new"]
        if (prompt, answers) not in warm:
            peer.answer(drawn(prompt, -2), 1, 2)
            peer.answer(drawn(FIRST_PROMPT, -3), answers, 3)
            warm.add((prompt, answers))
        first, total = peer.answer(drawn(prompt, asked["seed"]), answers, new)
        step = (total - first) / (new - 1)
        facts = {"prefill_s": first, "step_ms": 1e3 * step, "tok_s": answers / step, "total_s": total}
        replies.write(json.dumps(facts) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("peer", choices=PEERS)
    arguments.add_argument("path", type=Path)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--dtype", help="Of transformers.")
    given = arguments.parse_args()
    modules, peer = PEERS[given.peer]
    options = {"dtype": given.dtype} if given.dtype else {}
    serve(modules, lambda: peer(given.path, given.threads, **options))


if __name__ == "__main__":
    main()
