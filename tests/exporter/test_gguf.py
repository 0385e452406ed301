"""GGUF files: the graph of llama.cpp, written down here once more, computes from them what we do in one branch."""

import json
import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from pos2d import exporter, runtime
from pos2d.errors import InputError, ParityError, UsageError
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, SHAPE, linear_modules, random_adapter, weights, write_adapter, write_base
from tests.bounds import logits_bound
from tests.exporter.gguf_reading import GgufModel, go_rendered, sentencepiece_ids
from tests.tiny_tokenizers import pieces, random_text

PAIRS = [6, 3, 5, 1]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "attention_factor": 1.2}
FACTORS = [1.0, 1.3, 2.0, 3.1, 4.0, 4.0]
WIDE: dict[str, Any] = {**SHAPE, "hidden_size": 64, "intermediate_size": 96}
BASES: dict[str, PretrainedConfig] = CONFIGS | {
    "llama with longrope rope": LlamaConfig(
        **SHAPE, rope_parameters=LONGROPE | {"short_factor": FACTORS, "long_factor": FACTORS}
    ),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2 with wide heads": Qwen2Config(**{**SHAPE, "head_dim": 16}),
}
IDS: list[int] = np.random.default_rng(5).integers(3, 300, 40).tolist()


def inputs(place: Path, config: PretrainedConfig, **positions: Any) -> dict[str, Any]:
    base = write_base(place / "base", config)
    lora = write_adapter(place / "lora.pth", random_adapter(linear_modules(base)))
    return {"base_model": base, "lora": lora, **positions}


def exported(place: Path, flags: dict[str, Any], **options: Any) -> GgufModel:
    exporter.export(None, place / "out", format="gguf", **flags, **options)
    (path,) = (place / "out").glob("*.gguf")
    return GgufModel(path)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("positions", [{"pair_indices": PAIRS}, {"no_patch_rope": True}])
def test_its_graph_computes_what_we_do(name: str, positions: dict[str, Any], tmp_path: Path) -> None:
    """Every family and rope type, with branch frequencies among the fast and the slow ones, and without any."""
    flags = inputs(tmp_path, BASES[name], **positions)
    if name.startswith("qwen3") and ("pair_indices" in positions or "biases" in name):
        with pytest.raises(InputError, match=r"config.json: llama.cpp.* Qwen3.*`format='stock'` keeps it"):
            exported(tmp_path, flags)
        assert not (tmp_path / "out").exists()
        return
    model = exported(tmp_path, flags, dtype="float32")
    expected = runtime.load(device="cpu", dtype="float32", **flags).logits(np.array([IDS]))[0]
    assert np.abs(model.logits(IDS) - expected).max() <= logits_bound(expected)
    own = {"qwen3 with wide heads": "qwen3", "qwen2": "qwen2"} if "no_patch_rope" in positions else {}
    assert model.architecture == own.get(name, "llama")


def test_it_is_the_same_from_a_merge_and_says_that_it_has_one_branch(
    tmp_path: Path, call: Callable[..., Result]
) -> None:
    flags = inputs(tmp_path, BASES["mistral with wide heads"], pair_indices=PAIRS)
    exporter.merge(output=tmp_path / "merged", **flags)
    model = exported(tmp_path, flags, dtype="float32")
    exporter.export(tmp_path / "merged", tmp_path / "again", format="gguf", dtype="float32")
    assert GgufModel(tmp_path / "again" / "model-F32.gguf").tensors.keys() == model.tensors.keys()
    same = GgufModel(tmp_path / "again" / "model-F32.gguf").tensors
    assert all(torch.equal(same[name], model.tensors[name]) for name in same)
    manifest, trained = read_manifest(tmp_path / "out"), read_manifest(tmp_path / "merged").rope_2d
    assert (manifest.kind, manifest.one_branch_of, manifest.rope_2d.is_2d) == ("gguf", trained, False)
    assert "one branch of a model whose frequencies" in call("inspect", tmp_path / "out").stdout
    assert "with 2D RoPE" in model.fields["general.description"]


@pytest.mark.parametrize(
    ("quant", "head", "linear", "share"), [("q8_0", "Q8_0", "Q8_0", 0.5 / 127), ("q4_0", "Q8_0", "Q4_0", 1 / 8)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_quantised_from_the_exact_sum(
    quant: Any, head: str, linear: str, share: float, tied: bool, tmp_path: Path
) -> None:
    """What bfloat16 loses of a small adapter is not lost; rows that are not whole blocks stay as they are."""
    config = LlamaConfig(**{**WIDE, "intermediate_size": 80}, tie_word_embeddings=tied)
    base = write_base(tmp_path / "base", config)
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base)))
    flags: dict[str, Any] = {"base_model": base, "lora": lora, "rope_2d_ratio": 0.5}
    model = exported(tmp_path, flags, quant=quant, skip_modules="v_proj")
    assert model.kinds["token_embd.weight"] == (head if tied else linear)
    assert model.kinds.get("output.weight") == (None if tied else head)
    assert (model.kinds["blk.0.attn_q.weight"], model.kinds["blk.0.attn_v.weight"]) == (linear, "F16")
    assert (model.kinds["blk.0.ffn_down.weight"], model.kinds["blk.0.attn_norm.weight"]) == ("F16", "F32")
    exporter.merge(output=tmp_path / "merged", dtype="float32", **flags)
    exact = weights(tmp_path / "merged")["model.layers.1.self_attn.o_proj.weight"].double()
    largest = exact.abs().reshape(64, -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32).reshape(64, 64)
    assert ((model.tensors["blk.1.attn_output.weight"] - exact).abs() <= largest * (share + 2.0**-10)).all()
    totals = (read_manifest(tmp_path / "out").ledger or {})["totals"]
    assert 0.9 < totals["retention"] < 1.1
    assert totals["quantised"] == sum(kind.startswith("Q") for kind in model.kinds.values())


def test_what_is_written_wrongly_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of q in their old order, a factor that is missing, and a byte that changed."""
    flags = inputs(tmp_path, BASES["qwen2"], pair_indices=PAIRS)
    weights_module = import_module("pos2d.exporter.formats.gguf.weights")
    form = import_module("pos2d.exporter.formats.gguf.format")
    write, choose = weights_module.write_file, form.choose_architecture

    def turned(writer: Any, path: Path, *rest: Any) -> Any:
        tallies = write(writer, path, *rest)
        content = bytearray(path.read_bytes())
        content[next(t.data_offset for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")] ^= 0x40
        path.write_bytes(bytes(content))
        return tallies

    def without_factors(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        chosen.factors[4] = 1
        return chosen

    for module, name, wrong, message in (
        (
            weights_module,
            "row_places",
            lambda rows, _: np.arange(rows),
            r"tensor blk\.\d\.attn_[qk]\.(weight|bias), .* times as far off",
        ),
        (form, "write_file", turned, r"tensor .* times as far off"),
        (form, "choose_architecture", without_factors, "frequency 5"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            with pytest.raises(ParityError, match=message):
                exported(tmp_path, flags)
        assert not (tmp_path / "out").exists()


def test_options_and_models_that_it_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = inputs(tmp_path, BASES["llama"], no_patch_rope=True)
    for options, message in (
        ({"quant": "int4"}, "takes `quant` none, q8_0, q4_0"),
        ({"skip_modules": "q_proj"}, "give `quant` as well"),
        ({"quant": "q4_0"}, "leaves nothing to quantise: it needs layers with a multiple of 32 inputs"),
        ({"max_shard_size": "1GB"}, "`max_shard_size` belongs to"),
    ):
        with pytest.raises(UsageError, match=message):
            exported(tmp_path, flags, **options)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'pos2d\[gguf\]'"):
        exported(tmp_path, flags)
    assert not (tmp_path / "out").exists()


def test_our_commands_say_which_program_runs_it(tmp_path: Path, call: Callable[..., Result]) -> None:
    flags = inputs(tmp_path, BASES["llama"], rope_2d_ratio=0.5)
    report = exporter.export(None, tmp_path / "out", format="gguf", **flags)
    assert [warning for warning in report.warnings if "takes token ids only" in warning]
    assert runtime.verify(tmp_path / "out").passed
    with pytest.raises(InputError, match=r"out is of kind gguf, which llama.cpp .* run: .*llama-server"):
        runtime.load(tmp_path / "out")
    for arguments in (
        ("run", tmp_path / "out", "--prompt", "Hello"),
        ("plan", tmp_path / "out"),
        ("export", tmp_path / "out", "-o", tmp_path / "other"),
    ):
        result = call(*arguments)
        assert "kind gguf" in result.stderr, (arguments, result.stderr)
        assert result.stderr.count("\n") <= 2
    (path,) = (tmp_path / "out").glob("*.gguf")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="SHA-256"):
        runtime.verify(tmp_path / "out")


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou \"help\" \\ <|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system message stands in the last question.
INSTRUCTIONS = (
    "{{ bos_token }}{% set rest = messages if messages[0].role != 'system' else messages[1:] %}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = INSTRUCTIONS.replace("{{ bos_token }}", "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}")
TODAY = CHATML + "{{ strftime_now('%d') }}"
COUNTING = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
TURNS = [
    {"role": "user", "content": "Who wrote <it>?\n{{ braces }}"},
    {"role": "assistant", "content": 'She "did".'},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "In 1890."},
    {"role": "user", "content": "Na\u00efve \u65e5\u672c?"},
]


def write_byte_tokenizer(base: Path, template: str | None = None, **tokenizer: Any) -> None:
    """A small byte-level tokenizer with merges, which splits words as SmolLM's does."""
    from tests.tiny_tokenizers import byte_level

    stored = json.loads(byte_level().to_str())
    steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
    steps[1] |= {"trim_offsets": True, "use_regex": True}
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    texts = [("<s>", True), ("</s>", True), ("<|im_end|>", True), ("<tool>", False)]
    count = len(stored["model"]["vocab"])
    stored["added_tokens"] = [
        {"id": count + number, "content": text, "special": special, **added}
        for number, (text, special) in enumerate(texts)
    ]
    (base / "tokenizer.json").write_text(json.dumps(stored | tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"chat_template": template} if template is not None else {}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def ends(base: Path, *tokens: int) -> None:
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(tokens), "temperature": 0.7, "repetition_penalty": 1.1}), encoding="utf-8"
    )


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    flags = inputs(tmp_path, BASES["llama"], rope_2d_ratio=0.5)
    write_byte_tokenizer(flags["base_model"], CHATML)
    ends(flags["base_model"], 264, 265)
    fields = exported(tmp_path, flags).fields
    stored = json.loads((tmp_path / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 300
    assert all(tokens[number] == text for text, number in stored["model"]["vocab"].items())
    assert tokens[263:267] == ["<s>", "</s>", "<|im_end|>", "<tool>"]
    assert fields["tokenizer.ggml.token_type"][262:268] == [1, 3, 3, 3, 4, 5]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in stored["model"]["merges"]]
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")}
    assert ids == {"bos": 263, "eos": 264, "eot": 265}
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.chat_template"] == CHATML
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    for line in (
        "FROM ./model-F16.gguf",
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 512",
        "PARAMETER temperature 0.7",
        "PARAMETER repeat_penalty 1.1",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize(("template", "takes_system"), [(CHATML, True), (INSTRUCTIONS, True), (NO_SYSTEM, False)])
def test_the_modelfile_writes_a_conversation_as_the_chat_template_does(
    template: str, takes_system: bool, with_system: bool, tmp_path: Path
) -> None:
    from pos2d.exporter.formats.gguf.chat import chat_texts
    from pos2d.hf.tokenizer import load_tokenizer

    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    write_byte_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path)
    found, reason = chat_texts(tokenizer)
    assert (found is not None, reason) == (True, "")
    assert found is not None
    assert (found.system is not None) == takes_system
    system = [{"role": "system", "content": "Be brief."}] if with_system else []
    for turns in (TURNS[:1], TURNS[:3], TURNS):
        accepted = system + turns if takes_system else turns
        wanted = tokenizer.apply_chat_template(accepted, tokenize=False, add_generation_prompt=True)
        assert found.render(accepted) == wanted
        assert go_rendered(found.go_template, accepted) == wanted
        without = go_rendered(found.without_first("<s>").go_template, accepted)
        assert without == wanted.removeprefix("<s>")
    assert '"""' not in found.go_template


@pytest.mark.parametrize(
    ("template", "reason"), [(TODAY, "writes the date"), (COUNTING, "does more than"), (None, "has no chat template")]
)
def test_a_template_without_a_translation_is_said(template: str | None, reason: str, tmp_path: Path) -> None:
    flags = inputs(tmp_path, BASES["llama"], no_patch_rope=True)
    write_byte_tokenizer(flags["base_model"], template)
    exported(tmp_path, flags)
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "# No TEMPLATE: the" in text
    assert reason in text
    assert "\nTEMPLATE" not in text


@pytest.mark.parametrize("scheme", ["normaliser", "first", "never"])
def test_scores_merge_characters_as_the_merges_do(scheme: str, tmp_path: Path) -> None:
    made = pieces(scheme)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = MistralConfig(**{**SHAPE, "vocab_size": 400}, sliding_window=None)
    flags = inputs(tmp_path, config, no_patch_rope=True)
    made.save(str(flags["base_model"] / "tokenizer.json"))
    with pytest.raises(InputError, match=r"does not merge .* to its token .*, as SentencePiece and llama\.cpp do"):
        exported(tmp_path, flags)
    stored = json.loads(made.to_str())
    vocabulary = stored["model"]["vocab"]
    splits = (
        (text[:end], text[end:]) for text in sorted(vocabulary, key=vocabulary.get) for end in range(1, len(text))
    )
    stored["model"]["merges"] = [pair for pair in splits if set(pair) <= set(vocabulary)]
    made = Tokenizer.from_str(json.dumps(stored))
    made.save(str(flags["base_model"] / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (flags["base_model"] / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = exported(tmp_path, flags)
    assert model.fields["tokenizer.ggml.model"] == "llama"
    kinds = model.fields["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[256], kinds[made.token_to_id("<s>")]) == (6, 2, 3)
    draw = random.Random(3)
    for _ in range(200):
        text = random_text(draw).replace("</s>", "").strip(" ")
        if text:
            assert sentencepiece_ids(model, text) == made.encode(text, add_special_tokens=False).ids, text


TWO_FIRST: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2 + [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [263], "tokens": ["<s>"]}},
}
ONE_FIRST = TWO_FIRST | {"single": TWO_FIRST["single"][1:]}


def test_bos_is_put_first_where_the_tokenizer_does(tmp_path: Path) -> None:
    flags = inputs(tmp_path, BASES["llama"], no_patch_rope=True)
    write_byte_tokenizer(flags["base_model"], INSTRUCTIONS, post_processor=ONE_FIRST)
    fields = exported(tmp_path, flags).fields
    assert fields["tokenizer.ggml.add_bos_token"]
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "<s>" not in text.partition("TEMPLATE")[2].partition("PARAMETER")[0]
    write_byte_tokenizer(flags["base_model"], CHATML, post_processor=ONE_FIRST)
    report = exporter.export(None, tmp_path / "again", format="gguf", **flags)
    assert [warning for warning in report.warnings if "does not begin with BOS" in warning]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits texts in a way .* .pre_tokenizer Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "changes texts by Lowercase"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "is of type WordLevel"),
        ({"post_processor": TWO_FIRST}, r"puts the tokens \[263, 263\] around every text"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(tokenizer: dict[str, Any], message: str, tmp_path: Path) -> None:
    flags = inputs(tmp_path, BASES["llama"], no_patch_rope=True)
    write_byte_tokenizer(flags["base_model"], **tokenizer)
    with pytest.raises(InputError, match=rf"tokenizer\.json {message}"):
        exported(tmp_path, flags)
    assert not (tmp_path / "out").exists()


def test_llama_cpp_computes_what_we_do(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    flags = inputs(tmp_path, BASES["qwen2"], pair_indices=PAIRS)
    exported(tmp_path, flags, dtype="float32")
    model = llama_cpp.Llama(
        str(tmp_path / "out" / "model-F32.gguf"), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    model.eval(IDS)
    expected = runtime.load(device="cpu", dtype="float32", **flags).logits(np.array([IDS]))[0]
    assert np.abs(np.array(model.scores[: len(IDS)]) - expected).max() <= logits_bound(expected)
