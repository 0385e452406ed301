"""Which tokenizer travels with an artifact, and what both releases of transformers make of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pos2d import exporter
from pos2d.errors import InputError
from pos2d.exporter import MergeReport
from pos2d.manifest import read_manifest
from pos2d.sources.sidecars.sidecars import Sidecars, files_in, write_sidecars
from pos2d.sources.sidecars.tokenizer_settings import readable_settings
from tests.bases import CONFIGS, write_base, write_tokenizer
from tests.peft_files import write_peft
from tests.sources.test_peft import UNTIED
from tests.tiny_tokenizers import tiny_tokenizer

OLD = Path(sys.prefix) / "transformers-4.57"
BYTES = 256
TEXTS = ["plain", "a<mark>b </tool>  c\n", "<end>", "é 你好 <pad>x"]
SPECIAL = ["<end>", "<mark>", "</tool>", "<pad>"]
PROBE = """
import json, sys
from transformers import AutoTokenizer
texts, *directories = sys.argv[1:]
for directory in directories:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(text)["input_ids"] for text in json.loads(texts)]
    print(json.dumps([ids, sorted(tokenizer.all_special_ids), tokenizer.eos_token, sorted(tokenizer("a"))]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_base(tmp_path_factory.mktemp("tokenizers") / "base", CONFIGS[UNTIED])
    write_tokenizer(directory, chat=True, special=["<end>"])
    return directory


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    """An adapter without a tokenizer."""
    return write_peft(base.parent / "plain")


def with_tokenizer(plain: Path, target: Path, special: list[str], **settings: Any) -> Path:
    """A copy of the adapter with a tokenizer of its own."""
    shutil.copytree(plain, target)
    write_tokenizer(target, special=special)
    edit(target / "tokenizer_config.json", settings)
    return target


def edit(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def merge(base: Path, *lora: Path, output: Path, **options: Any) -> MergeReport:
    return exporter.merge(base, lora, output, no_patch_rope=True, **options)


def probe(directories: list[Path], release: Path | None) -> list[Any]:
    """Ids, special ids, end token and inputs of each, in the release of transformers that is at ``release``."""
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"} | ({"PYTHONPATH": str(release)} if release else {})
    command = [sys.executable, "-c", PROBE, json.dumps(TEXTS), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(directories) :]]


def test_the_tokenizer_of_the_adapter_travels_whole(base: Path, plain: Path, tmp_path: Path) -> None:
    own = with_tokenizer(plain, tmp_path / "own", ["<end>", "<call>"], eos_token="<call>")
    templates = own / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("tools", encoding="utf-8")
    (own / "chat_template.jinja").write_text("mine", encoding="utf-8")
    edit(base / "generation_config.json", {"eos_token_id": [2, 7], "temperature": 0.5})
    report = merge(base, own, output=tmp_path / "out")
    out = tmp_path / "out"
    assert report.tokenizer == "own"
    manifest = read_manifest(out)
    assert manifest.options["tokenizer"]["of"] == "own"
    assert manifest.eos_token_ids == (257, 2, 7)
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["eos_token_id"], generation["temperature"]) == ([257, 2, 7], 0.5)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == [257, 2, 7]
    assert "additional_chat_templates/tools.jinja" in manifest.files
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("x<call>").input_ids[-1] == 257
    assert tokenizer.chat_template == {"default": "mine", "tools": "tools"}
    exporter.export(out, tmp_path / "onnx", format="onnx", no_verify=True)
    assert (tmp_path / "onnx" / "additional_chat_templates" / "tools.jinja").is_file()
    assert read_manifest(tmp_path / "onnx").eos_token_ids == (257, 2, 7)
    assert merge(base, own, output=out, resume=True).tokenizer == "own"  # a finished one, with a folder in it


def test_a_merge_in_memory_has_the_tokenizer_of_the_adapter(base: Path, plain: Path, tmp_path: Path) -> None:
    from pos2d.compat import load_model_with_lora

    own = with_tokenizer(plain, tmp_path / "own", ["<end>", "<call>"], eos_token="<call>")
    model, tokenizer, _ = load_model_with_lora(base, own, None, patch_rope=False, device="cpu")
    assert tokenizer("<call>").input_ids == [BYTES + 1]
    assert model.generation_config.eos_token_id[0] == BYTES + 1


def test_without_one_of_its_own_the_base_s_travels(base: Path, plain: Path, tmp_path: Path) -> None:
    assert merge(base, plain, output=tmp_path / "base's").tokenizer == "base"
    template = shutil.copytree(plain, tmp_path / "template")
    (template / "chat_template.jinja").write_text("only this", encoding="utf-8")
    assert merge(base, template, output=tmp_path / "out").tokenizer == "template"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.chat_template == "only this"
    assert tokenizer("<end>").input_ids == [BYTES]


def test_different_tokenizers_are_refused_and_can_be_chosen(base: Path, plain: Path, tmp_path: Path) -> None:
    one = with_tokenizer(plain, tmp_path / "one", ["<end>", "<one>"])
    two = with_tokenizer(plain, tmp_path / "two", ["<end>", "<two>"])
    same = with_tokenizer(plain, tmp_path / "same", ["<end>", "<one>"], padding_side="left")
    with pytest.raises(InputError, match=r"/one and .*/two come with different tokenizers; .*`tokenizer`"):
        merge(base, one, two, output=tmp_path / "no")
    assert merge(base, one, same, output=tmp_path / "like").tokenizer == "one"
    assert merge(base, one, two, output=tmp_path / "chosen", tokenizer=two).tokenizer == "two"
    assert merge(base, one, output=tmp_path / "later", then=two).tokenizer == "two"
    assert merge(base, one, output=tmp_path / "first", then=plain).tokenizer == "one"
    for wrong, words in (
        (plain, "has no tokenizer"),
        (two / "tokenizer.json", "is one file; give its directory, .*/two"),
    ):
        with pytest.raises(InputError, match=words):
            merge(base, one, output=tmp_path / "no", tokenizer=wrong)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(base: Path, plain: Path, tmp_path: Path) -> None:
    own = with_tokenizer(plain, tmp_path / "own", [f"<{number}>" for number in range(300 - BYTES + 1)])
    with pytest.raises(InputError, match="tokenizer of own has ids up to 300, but embedding and head have 300 rows"):
        merge(base, own, output=tmp_path / "out")


NAMED = {"image_token": "<mark>"}
AS_WRITTEN: dict[str, dict[str, Any]] = {
    "a list of further tokens": {"extra_special_tokens": ["<mark>", "</tool>"]},
    "a list in both names": {"extra_special_tokens": ["<mark>"], "additional_special_tokens": ["</tool>"]},
    "tokens with names": {"extra_special_tokens": NAMED},
    "tokens with names of release 5": {"model_specific_special_tokens": NAMED, "extra_special_tokens": ["</tool>"]},
    "a token with a name of its own": NAMED,
    "a class of release 5": {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
    "a class that puts a token first": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<mark>"},
    "a class that splits words": {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True, "bos_token": "<mark>"},
    "tokens that are objects": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": [{"content": "<mark>", "lstrip": False, "normalized": False}],
    },
    "code of its own": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Slow", "mine.Fast"]}},
}


def test_both_releases_read_the_same_tokenizer(base: Path, plain: Path, tmp_path: Path) -> None:
    """One process for each release, so that importing them is paid once."""
    outputs = []
    for number, settings in enumerate(AS_WRITTEN.values()):
        common = {"eos_token": "<end>", "pad_token": "<pad>"}
        own = with_tokenizer(plain, tmp_path / f"own{number}", SPECIAL, **common, **settings)
        (own / "special_tokens_map.json").write_text(json.dumps(common), encoding="utf-8")
        outputs.append(tmp_path / f"out{number}")
        merge(base, own, output=outputs[-1])
        # Without the code of the model, which takes seconds to import and has no part in this.
        (outputs[-1] / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    found = [probe(outputs, release) for release in (None, OLD)]
    for case, new, old in zip(AS_WRITTEN, *found, strict=True):
        assert new == old, case
        ids, special, end, inputs = new
        assert ids[1][1] == BYTES + 1, case
        assert {BYTES, BYTES + 3} <= set(special), case
        assert end == "<end>"
        assert inputs == ["attention_mask", "input_ids"]
    assert {BYTES + 1, BYTES + 2} <= set(found[0][0][1])
    assert BYTES + 1 in found[0][2][1]


def test_a_tokenizer_of_mistral_is_taken_as_its_file_stands(tmp_path: Path) -> None:
    """Release 5 does not use the declared class for such a base, but would for the artifact."""
    source, target = tmp_path / "base", tmp_path / "out"
    for directory, family in ((source, "mistral"), (target, "qwen3")):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    tiny_tokenizer("mark by a normaliser").backend_tokenizer.save(str(source / "tokenizer.json"))
    edit(source / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": None})
    write_sidecars(Sidecars(files_in(source)), target, "mistral")
    expected, found = (AutoTokenizer.from_pretrained(directory) for directory in (source, target))
    for text in (" the Hello</s>Hello", "Hello world"):
        assert found(text).input_ids == expected(text).input_ids


def test_settings_that_are_readable_stay() -> None:
    for settings in AS_WRITTEN.values():
        once = readable_settings(settings, whole=True)
        assert readable_settings(once, whole=True) == once
        assert not isinstance(once.get("extra_special_tokens"), list)


@pytest.mark.parametrize("named", [True, False])
def test_a_vocabulary_and_merges_become_a_tokenizer_json(base: Path, plain: Path, tmp_path: Path, named: bool) -> None:
    source = shutil.copytree(base, tmp_path / "base")
    model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (source / "tokenizer.json").unlink()
    vocabulary = model["vocab"] | {"Ġt": BYTES, "he": BYTES + 1}
    (source / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\n", encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer"} if named else {}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    edit(source / "config.json", {"model_type": "qwen3"})
    report = merge(source, plain, output=tmp_path / "out")
    assert not report.warnings
    expected = AutoTokenizer.from_pretrained(source)("say the thé").input_ids
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("say the thé").input_ids
    assert found == expected
    assert BYTES in found


def test_a_vocabulary_that_cannot_be_converted_is_said(base: Path, plain: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "base")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"not a model")
    [warning] = merge(source, plain, output=tmp_path / "out").warnings
    assert "tokenizer.model but no tokenizer.json" in warning
    assert "save_pretrained" in warning
    assert (tmp_path / "out" / "tokenizer.model").is_file()
