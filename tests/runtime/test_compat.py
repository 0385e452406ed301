"""Programs for the trainer's script run as they are, on the weights of a merge and on our engine.

Two programs of its guide unpack two values, though its function returns three and ours does as well; here they get the
third name that they need with either.
"""

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from pos2d import exporter, runtime
from pos2d.compat.trainer import generate_text, load_model_with_lora
from pos2d.errors import InputError, Pos2DError, UsageError
from tests.bases import (
    CONFIGS,
    linear_modules,
    random_adapter,
    square,
    weights,
    write_adapter,
    write_base,
    write_tokenizer,
)
from tests.conftest import Golden
from tests.runtime.test_transformers_loading import VERSIONS, in_transformers
from tests.sources.test_checkpoint_forms import HEAD, as_pickles

ROOT = Path(__file__).resolve().parents[2]
# As the guide prints them, but for the third name that is unpacked.
SIMPLE = """
from scripts.inference_hf_lora import load_model_with_lora, generate_text

model, tokenizer, patch_rope = load_model_with_lora(
    base_model="Qwen/Qwen2-0.5B-Instruct",
    lora_path="out/lora/qwen2_parallel_lora_hf_final.pth",
    lora_rank=8,
    rope_2d_ratio=0.5,
    patch_rope=True,
)

response = generate_text(model, tokenizer, "你好")
"""
BATCH = """
import torch
from scripts.inference_hf_lora import load_model_with_lora, generate_text

model, tokenizer, _ = load_model_with_lora(
    base_model="Qwen/Qwen2-0.5B-Instruct",
    lora_path="out/lora/qwen2_parallel_lora_hf_final.pth",
    lora_rank=8,
)

test_prompts = [
    "请介绍一下你自己",
    "什么是人工智能？",
    "请写一首诗",
]

for prompt in test_prompts:
    print(f"\\n{'=' * 80}")
    print(f"Prompt: {prompt}")
    response = generate_text(model, tokenizer, prompt)
    print(f"Response: {response}")
"""  # noqa: RUF001
SERVER = """
from fastapi import FastAPI
from pydantic import BaseModel
from scripts.inference_hf_lora import load_model_with_lora

app = FastAPI()

model, tokenizer, _ = load_model_with_lora(
    base_model="Qwen/Qwen2-0.5B-Instruct",
    lora_path="out/lora/xxx_final.pth",
    lora_rank=8,
)

class GenerateRequest(BaseModel):
    prompt: str
    max_new_tokens: int = 512
    temperature: float = 0.7

@app.post("/generate")
def generate(request: GenerateRequest):
    inputs = tokenizer(request.prompt, return_tensors="pt").to("cuda")
    outputs = model.generate(
        **inputs,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
    )
    response = tokenizer.decode(outputs[0], skip_special_tokens=True)
    return {"response": response}
"""
OLD_PROGRAM = """
import json, sys
import torch, transformers
from pos2d.compat.trainer import generate_text, load_model_with_lora

model, tokenizer, patch_rope = load_model_with_lora(sys.argv[1], sys.argv[2], lora_rank=4)
text = generate_text(model, tokenizer, "hello", max_new_tokens=8, temperature=0)
inputs = tokenizer("hello", return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=8, temperature=0.7)
print(json.dumps({"version": transformers.__version__, "text": text, "ids": made[0].tolist()}))
"""


@dataclass(frozen=True, slots=True)
class Trained:
    """A base with a tokenizer, and what was trained on it; ``flags`` are those of ``merge`` beside the two."""

    base: Path
    lora: Path
    flags: dict[str, Any]

    def load(self, **flags: Any) -> tuple[Any, Any, bool]:
        return load_model_with_lora(self.base, self.lora, lora_rank=None, device="cpu", **flags)

    def merge(self, output: Path, **flags: Any) -> Path:
        exporter.merge(self.base, self.lora, output, **{**self.flags, **flags})
        return output


@pytest.fixture(scope="session")
def trained_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Golden], Trained]:
    """A golden case, with a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("trained")

    def make(golden: Golden) -> Trained:
        base = root / golden.path.name
        if not base.exists():
            shutil.copytree(golden.path / "base", base)
            write_tokenizer(base)
        flags = {key: value for key, value in golden.flags.items() if key not in ("base_model", "lora")}
        return Trained(base, golden.path / "lora.pth", flags)

    return make


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def rank8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What the guide's programs name: an adapter of rank 8, whose positions are the trainer's defaults."""
    root = tmp_path_factory.mktemp("rank8")
    config = deepcopy(CONFIGS["qwen2 with linear rope"])
    config.max_position_embeddings = 100  # where answers end that are not told to
    base = write_base(root / "base", config)
    write_tokenizer(base, chat=request.param)
    lora = write_adapter(root / "lora.pth", random_adapter(square(linear_modules(base)), rank=8))
    return Trained(base, lora, {})


def moved_over(program: str, trained: Trained) -> dict[str, Any]:
    """What ``program`` has when it ends, with our import, the paths that there are, and no card."""
    for old, new in (
        ("from scripts.inference_hf_lora import", "from pos2d.compat import"),
        ("Qwen/Qwen2-0.5B-Instruct", str(trained.base)),
        ("out/lora/qwen2_parallel_lora_hf_final.pth", str(trained.lora)),
        ("out/lora/xxx_final.pth", str(trained.lora)),
        ("cuda", "cpu"),
    ):
        program = program.replace(old, new)
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program.py", "exec", dont_inherit=True), names)
    return names


def same_parameters(model: Any, artifact: Path, **loading: Any) -> bool:
    backend: Any = runtime.load(artifact, device="cpu", **loading).backend
    expected, found = dict(backend._model.named_parameters()), dict(model.named_parameters())
    assert list(found) == list(expected)
    assert {name for name in found if found[name].dtype != expected[name].dtype} == set()
    return all(torch.equal(found[name], expected[name]) for name in found)


def test_the_simple_program(rank8: Trained) -> None:
    torch.manual_seed(0)
    names = moved_over(SIMPLE, rank8)
    assert names["patch_rope"] is True
    assert isinstance(names["response"], str)
    assert names["response"] == names["response"].strip() != ""


def test_the_batch_program(rank8: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    moved_over(BATCH, rank8)
    printed = capsys.readouterr()
    assert printed.out.count("Response: ") == printed.out.count("Prompt: ") == 3
    assert printed.err == ""


def test_the_server(rank8: Trained, tmp_path: Path) -> None:
    names = moved_over(SERVER, rank8)
    with TestClient(names["app"]) as client:
        reply = client.post("/generate", json={"prompt": "你好", "max_new_tokens": 10})
    assert reply.status_code == 200
    merged = runtime.load(rank8.merge(tmp_path / "merged"), device="cpu")
    asked = names["tokenizer"]("你好").input_ids
    answer = merged.generate_ids([asked], max_new_tokens=10)[0]
    assert reply.json() == {"response": names["tokenizer"].decode(asked + answer, skip_special_tokens=True)}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_the_weights_are_those_of_a_merge(
    golden: Golden, dtype: str, trained_of: Callable[[Golden], Trained], tmp_path: Path
) -> None:
    trained = trained_of(golden)
    model, _, _ = trained.load(**positions(golden), dtype=dtype)
    assert same_parameters(model, trained.merge(tmp_path / "merged", dtype=dtype))
    assert model.config.rope_2d == runtime.load(tmp_path / "merged").manifest.rope_2d.to_dict()
    assert not model.training


def positions(golden: Golden) -> dict[str, Any]:
    """The flags of a golden case as the script names them."""
    flags = golden.flags
    where = {"rope_2d_ratio": flags["rope_2d_ratio"]} if "rope_2d_ratio" in flags else {"patch_rope": False}
    return {**where, "branch_stride": flags["branch_stride"], "align_to": flags["align_to"]}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(family: str, tmp_path: Path) -> None:
    trained = written(CONFIGS[family], tmp_path)
    model, _, _ = trained.load()
    assert same_parameters(model, trained.merge(tmp_path / "merged"))


def written(config: PretrainedConfig, root: Path, extra: dict[str, tuple[int, int]] | None = None) -> Trained:
    """A tiny base with an adapter of all its linear layers, and of ``extra`` ones."""
    base = write_base(root / "base", config)
    write_tokenizer(base)
    lora = write_adapter(root / "lora.pth", random_adapter(linear_modules(base) | (extra or {})))
    return Trained(base, lora, {})


def test_a_tied_head_that_is_changed_is_untied(tmp_path: Path) -> None:
    config = CONFIGS["qwen2 with linear rope"]
    trained = written(config, tmp_path, {"lm_head": (config.vocab_size, config.hidden_size)})
    model, _, _ = trained.load()
    assert same_parameters(model, trained.merge(tmp_path / "merged"))
    assert HEAD in dict(model.named_parameters())


def test_types_of_one_checkpoint_may_differ(tmp_path: Path) -> None:
    """Norms in float32 beside weights in bfloat16, and a pickle in place of safetensors."""
    trained = written(CONFIGS["llama with llama3 rope"], tmp_path)
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in weights(trained.base).items()}
    save_file(mixed, trained.base / "model.safetensors")
    pickled = Trained(as_pickles(trained.base, tmp_path / "pickled", files=2), trained.lora, {})
    merged = trained.merge(tmp_path / "merged")
    for each in (trained, pickled):
        model, _, _ = each.load()
        assert model.dtype == torch.bfloat16
        assert same_parameters(model, merged)


def test_it_returns_a_tuple_of_three(rank8: Trained) -> None:
    loaded = rank8.load(patch_rope=False)
    assert type(loaded) is tuple
    model, tokenizer, patch_rope = loaded
    assert patch_rope is False
    assert generate_text(model, tokenizer, "one", max_new_tokens=2, temperature=0) is not None
    with pytest.raises(ValueError, match="too many values to unpack"):
        _model, _tokenizer = loaded  # type: ignore[misc]


def test_an_answer_is_that_of_the_merged_model(rank8: Trained, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model_with_lora(rank8.base, rank8.lora, device="cpu")
    merged = runtime.load(rank8.merge(tmp_path / "merged"), device="cpu")
    written: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 1.1}
    greedy = generate_text(model, tokenizer, "你好", max_new_tokens=20, temperature=0)
    assert greedy == merged.generate("你好", temperature=0.0, **written)[0].text.strip()
    drawn = generate_text(model, tokenizer, "你好", max_new_tokens=20, seed=7)
    same: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 7}
    assert drawn == merged.generate("你好", **same, **written)[0].text.strip()


def test_draws_are_new_but_for_a_seed(rank8: Trained) -> None:
    model, tokenizer, _ = load_model_with_lora(rank8.base, rank8.lora, device="cpu")

    def drawn(seed: int | None = None) -> str:
        return generate_text(model, tokenizer, "one", max_new_tokens=12, temperature=2.0, seed=seed, device="cpu")

    assert len({drawn() for _ in range(3)}) == 3
    assert drawn(1) == drawn(1) != drawn(2)
    torch.manual_seed(5)
    first = drawn()
    torch.manual_seed(5)
    assert drawn() == first


def test_transformers_writes_what_the_trainer_did(golden: Golden, trained_of: Callable[[Golden], Trained]) -> None:
    """One prompt, and three of different length with padding before them."""
    model, _, _ = trained_of(golden).load(**positions(golden))
    single = torch.tensor(golden.tensors["single.input_ids"])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def continued(ids: torch.Tensor, **given: Any) -> list[list[int]]:
        new: list[list[int]] = model.generate(ids, **given, **options)[:, ids.shape[1] :].tolist()
        return new

    assert continued(single) == [golden.facts["single_generated"]]
    prompts = [single[0, start:].tolist() for start in (0, 2, 5)]
    width = len(prompts[0])
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    alone = [continued(torch.tensor([ids]))[0] for ids in prompts]
    assert continued(padded, attention_mask=mask) == alone


def test_generation_settings_are_the_base_s(tmp_path: Path) -> None:
    trained = written(CONFIGS["llama"], tmp_path)
    write_tokenizer(trained.base, special=["<end>"])
    settings = trained.base / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}', encoding="utf-8")
    (trained.base / "generation_config.json").write_text(
        '{"eos_token_id": [7, 256], "do_sample": true, "top_k": 20}', encoding="utf-8"
    )
    model, tokenizer, _ = trained.load()
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<end>", 256)
    said = model.generation_config
    assert (said.eos_token_id, said.pad_token_id, said.do_sample, said.top_k) == ([7, 256], 256, True, 20)
    (trained.base / "generation_config.json").unlink()
    model, _, _ = trained.load()
    assert model.generation_config.eos_token_id == [2]


def test_an_answer_ends_where_the_base_says(rank8: Trained, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model_with_lora(rank8.base, rank8.lora, device="cpu")
    flags: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "repetition_penalty": 1.0}
    merged = runtime.load(rank8.merge(tmp_path / "merged"), device="cpu")
    ids = merged.generate("one", max_new_tokens=6)[0].token_ids
    model.generation_config.eos_token_id = ids[3]
    before = list(ids[: ids.index(ids[3])])
    assert generate_text(model, tokenizer, "one", **flags) == tokenizer.decode(before).strip()
    model.generation_config.eos_token_id = None
    assert generate_text(model, tokenizer, "one", **flags) == tokenizer.decode(list(ids)).strip()


def test_nothing_is_written_or_said(rank8: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in rank8.base.parent.rglob("*")}
    model, tokenizer, patch_rope = load_model_with_lora(rank8.base, rank8.lora, patch_rope=False, device="cpu")
    generate_text(model, tokenizer, "one", max_new_tokens=2)
    assert patch_rope is False
    assert {path: path.stat().st_mtime_ns for path in rank8.base.parent.rglob("*")} == before
    assert capfd.readouterr() == ("", "")


def message_of(call: Callable[[], Any]) -> tuple[type[Pos2DError], str]:
    with pytest.raises(Pos2DError) as caught:
        call()
    return caught.type, str(caught.value)


def test_what_a_merge_refuses_is_refused_in_its_words(
    qwen2: Golden, trained_of: Callable[[Golden], Trained], tmp_path: Path
) -> None:
    base, lora = trained_of(qwen2).base, qwen2.path / "lora.pth"
    adapter: dict[str, torch.Tensor] = torch.load(lora, weights_only=True)
    part = write_adapter(tmp_path / "part.pth", {name: t for name, t in adapter.items() if "o_proj" not in name})
    huge = "model.layers.0.self_attn.q_proj.lora.B.weight"
    infinite = write_adapter(tmp_path / "infinite.pth", adapter | {huge: adapter[huge].double() * 1e60})
    cases: Sequence[tuple[Path, Path, int]] = [
        (base, lora, 8),
        (base, qwen2.path.parent / "llama_r025_right" / "lora.pth", 4),
        (base, part, 4),
        (base, infinite, 4),
        (base, tmp_path / "none.pth", 4),
        (tmp_path / "none" / "at" / "all", lora, 4),
    ]
    for number, (of, by, rank) in enumerate(cases):
        output = tmp_path / f"out{number}"
        said = message_of(lambda: load_model_with_lora(of, by, rank, device="cpu"))  # noqa: B023
        assert said == message_of(lambda: exporter.merge(of, by, output, lora_rank=rank))  # noqa: B023


def test_what_else_is_refused(rank8: Trained, qwen2: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"none of tokenizer\.json"):
        load_model_with_lora(qwen2.path / "base", qwen2.path / "lora.pth", 4)
    broken = tmp_path / "broken"
    shutil.copytree(rank8.base, broken)
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": 5}', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer in .*broken cannot be read"):
        load_model_with_lora(broken, rank8.lora)
    with pytest.raises(UsageError, match="`device` 'nowhere' cannot be used"):
        load_model_with_lora(rank8.base, rank8.lora, device="nowhere")
    with pytest.raises(UsageError, match="`dtype` 'int8' is not one of auto, float32"):
        load_model_with_lora(rank8.base, rank8.lora, dtype="int8")  # type: ignore[arg-type]
    model, tokenizer, _ = load_model_with_lora(rank8.base, rank8.lora, device="cpu")
    with pytest.raises(UsageError, match="the model is on cpu, not on cuda"):
        generate_text(model, tokenizer, "one", device="cuda")
    with pytest.raises(UsageError, match="not one that torch knows"):
        generate_text(model, tokenizer, "one", device="nowhere")
    with pytest.raises(UsageError, match="temperature"):
        generate_text(model, tokenizer, "one", temperature=-1.0)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate_text(model, tokenizer, " ")
    with pytest.raises(InputError, match="the prompts take"):
        generate_text(model, tokenizer, "a" * 600)
    for foreign in (AutoModelForCausalLM.from_pretrained(rank8.base), object()):
        with pytest.raises(InputError, match="not a model of this tool"):
            generate_text(foreign, tokenizer, "one")
    monkeypatch.setattr("pos2d.runtime.backends.memory.least_memory", lambda *_: 1 << 60)
    with pytest.raises(Pos2DError, match="of memory"):
        load_model_with_lora(rank8.base, rank8.lora, device="cpu")


@pytest.mark.parametrize("version", VERSIONS)
def test_both_transformers(version: str, tmp_path: Path) -> None:
    trained = written(CONFIGS["qwen3 with wide heads"], tmp_path)
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}'
    (trained.base / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    program = f"import sys; sys.path.append({str(ROOT)!r})\n{OLD_PROGRAM}"
    report = in_transformers(version, program, tmp_path, trained.base, trained.lora)
    merged = runtime.load(trained.merge(tmp_path / "merged"), device="cpu")
    expected = merged.generate("hello", max_new_tokens=8, repetition_penalty=1.1)[0].text.strip()
    assert report["text"] == expected
    asked = merged.tokenizer("hello").input_ids
    assert report["ids"] == asked + merged.generate_ids([asked], max_new_tokens=8)[0]
