"""Chat templates of every habit: contexts, branches, begun answers, variables, and contents in parts."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pos2d import runtime
from pos2d.errors import InputError, UsageError
from pos2d.runtime.text.chat_template import render_for_answer
from pos2d.runtime.text.completions import collect
from pos2d.runtime.text.tokenization import encode, encode_prompts
from tests.tiny_tokenizers import tiny_tokenizer

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
# As published ones: Gemma and Llama 2 put the system message into the user's, Qwen3 shows the newest thoughts only.
TEMPLATES = {
    "plain": TURNS + OPEN,
    "wants a question": "{% if messages[-1].role == 'system' %}{{ raise_exception('no question') }}{% endif %}"
    + TURNS
    + OPEN,
    "always opens": TURNS + "<assistant>",
    "system in the question": (
        "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% else %}<{{ m.role }}>"
        "{% if m.role == 'user' and ns.system %}{{ ns.system }}\n\n{% set ns.system = '' %}{% endif %}{{ m.content }}\n"
        "{% endif %}{% endfor %}"
    ).join(("{% set ns = namespace(system='') %}", OPEN)),
    "newest thoughts": (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}[thoughts]{% endif %}"
        "{{ m.content }}\n{% endfor %}"
    )
    + OPEN,
}
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<system>default\n{% endif %}" + TEMPLATES["plain"]
THINKING = TURNS + "{% if add_generation_prompt %}<assistant>{% if thinking is false %}[none]{% endif %}{% endif %}"
PROMPTS = ["one", "and two", "a third"]
BEGUN = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "Sure, "}]


@pytest.fixture
def template(talker: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the chat template of the model."""
    return lambda text: monkeypatch.setattr(talker.tokenizer, "chat_template", text)


def rendered(model: runtime.Model, messages: Sequence[Any], **more: Any) -> list[int]:
    text: str = model.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **more)
    return encode(model.tokenizer, text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_context_is_shared_with_every_template(talker: runtime.Model, template: Any, name: str) -> None:
    """Its tokens do not depend on the number of prompts, and with each prompt they are those of the whole chat."""
    template(TEMPLATES[name])
    contexts = []
    for prompts in (PROMPTS[:1], PROMPTS):
        encoded = encode_prompts(talker.tokenizer, prompts, "be brief", chat=True, add_special_tokens=False)
        for prompt, ids in zip(prompts, encoded.branches, strict=True):
            turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": prompt}]
            assert (encoded.context or []) + ids == rendered(talker, turns)
        contexts.append(talker.tokenizer.decode(encoded.context))
    assert contexts[0] == contexts[1]
    assert "be brief" in contexts[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_questions_branch_off_a_conversation_with_every_template(
    talker: runtime.Model, template: Any, name: str
) -> None:
    template(TEMPLATES[name])
    earlier = [*({"role": role, "content": f"the {role}"} for role in ("user", "assistant"))]
    conversation = talker.conversation(earlier, max_new_tokens=5, visibility="isolated", branch_stride=1)
    answers = collect(conversation.ask_branches(PROMPTS), PROMPTS)
    assert conversation.messages == earlier
    assert [answer.prompt for answer in answers] == PROMPTS
    after = collect(conversation.ask("one"), ["one"])[0]
    (expected,) = talker.generate_ids(
        [rendered(talker, [*earlier, {"role": "user", "content": "one"}])], max_new_tokens=5
    )
    assert list(after.token_ids) == expected


def test_an_empty_system_message_is_one(talker: runtime.Model, template: Any) -> None:
    template(DEFAULT_SYSTEM)
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "one"}]
    empty, absent = (talker.generate("one", context, max_new_tokens=6)[0] for context in ("", None))
    assert empty == talker.generate("one", "", max_new_tokens=6)[0]
    assert absent == talker.chat(turns[1:], max_new_tokens=6)
    encoded = encode_prompts(talker.tokenizer, ["one"], "", chat=True, add_special_tokens=False)
    assert (encoded.context or []) + encoded.branches[0] == rendered(talker, turns) != rendered(talker, turns[1:])


def test_a_begun_answer_is_continued(talker: runtime.Model, tmp_path: Path) -> None:
    """By a chat, a conversation and a batch alike; what follows is the answer, and the messages have both."""
    (expected,) = talker.generate_ids([encode(talker.tokenizer, "<user>one\n<assistant>Sure, ")], max_new_tokens=6)
    answer = talker.chat(BEGUN, max_new_tokens=6)
    assert list(answer.token_ids) == expected
    conversation = talker.conversation(BEGUN[:1], max_new_tokens=6)
    assert collect(conversation.ask(BEGUN[1]), ["Sure, "])[0] == answer
    assert conversation.messages == [BEGUN[0], {"role": "assistant", "content": "Sure, " + answer.text}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": BEGUN}), encoding="utf-8")
    runtime.batch(talker.path, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=6)
    record = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert record["completions"][0]["text"] == answer.text


@pytest.mark.parametrize("content", ["m.content", "m.content | trim"], ids=["keeps", "trims"])
@pytest.mark.parametrize("begun", ["", " ", "\n"])
def test_an_empty_answer_is_continued_after_its_header(
    talker: runtime.Model, template: Any, content: str, begun: str
) -> None:
    """The white space of the header stays, as in Llama 3's, which ends in empty lines."""
    template(f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ '\n\n' }}}}{{{{ {content} }}}}</s>{{% endfor %}}")
    text = render_for_answer(talker.tokenizer, [BEGUN[0], {"role": "assistant", "content": begun}])
    assert text == "<user>\n\none</s><assistant>\n\n" + ("" if "trim" in content else begun)


def test_templates_without_a_default_are_refused(talker: runtime.Model, template: Any) -> None:
    template({"tool_use": TURNS, "rag": TURNS})
    with pytest.raises(InputError, match="tool_use, rag; name one of them 'default'"):
        talker.chat(BEGUN[:1], chat_template_kwargs={"a": 1})


def test_an_answer_that_the_template_hides_is_not_continued(talker: runtime.Model, template: Any) -> None:
    template("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(InputError, match="cannot continue the assistant's last message"):
        talker.chat(BEGUN)


def test_variables_of_the_template(talker: runtime.Model, template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach every way to ask; one that the template does not read is refused."""
    template(THINKING)
    options: Any = {"chat_template_kwargs": {"thinking": False}, "max_new_tokens": 6}
    turns = [{"role": "user", "content": "one"}]
    (expected,) = talker.generate_ids([rendered(talker, turns, thinking=False)], max_new_tokens=6)
    assert rendered(talker, turns, thinking=False) != rendered(talker, turns)
    assert list(talker.generate("one", **options)[0].token_ids) == expected
    assert list(talker.chat(turns, **options).token_ids) == expected
    assert list(collect(talker.conversation(**options).ask("one"), ["one"])[0].token_ids) == expected
    for ask in (talker.generate, lambda prompt, **given: talker.conversation(**given).ask(prompt)):
        with pytest.raises(UsageError, match=r"'thinkin', which the chat template .* does not read"):
            ask("one", chat_template_kwargs={"thinkin": False})
    for wrong, words in (({"tokenize": True}, "which pos2d sets itself"), ([1], "must be a JSON object")):
        with pytest.raises(UsageError, match=words):
            talker.generate("one", chat_template_kwargs=wrong)
    with pytest.raises(UsageError, match="no effect with `ignore_chat_template`"):
        talker.generate("one", ignore_chat_template=True, **options)
    template(None)
    with pytest.raises(UsageError, match="no effect without a chat template"):
        talker.generate("one", **options)


def test_variables_in_lines_and_flags(call: Any, talking: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    artifact.symlink_to(talking / "onnx", target_is_directory=True)
    lines = [{"prompt": "one", "chat_template_kwargs": values} for values in ({"m": 1}, {"x": 1}, "no")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    runtime.batch(artifact, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=3)
    first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["completions"]
    assert "'x', which the chat template" in second["error"]
    assert "must be a JSON object" in third["error"]
    for text, code, words in (("{", 2, "must be a JSON object"), ('{"x": 1}', 2, "does not read"), ('{"m": 1}', 0, "")):
        done = call("run", artifact, "-p", "one", "-n", 2, "--chat-template-kwargs", text)
        assert done.exit_code == code
        assert words in done.stderr


def test_a_content_may_be_a_list_of_texts(talker: runtime.Model, tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    answer = talker.chat(parts, max_new_tokens=6)
    assert answer == talker.chat([{"role": "user", "content": "one\ntwo"}], max_new_tokens=6)
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": parts}), encoding="utf-8")
    runtime.batch(talker.path, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=6)
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["completions"][0]["text"] == answer.text
    with pytest.raises(InputError, match="a part 'image_url'; only parts with type 'text'"):
        talker.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


class Scripted:
    """Notes the tokens that a model is fed, and lets it write what ``script`` says."""

    def __init__(self, model: runtime.Model) -> None:
        self.fed: list[int] = []
        self.script: Iterator[int] = iter(())
        self._forward = model.backend.forward

    def forward(self, input_ids: Any, *more: Any) -> Any:
        self.fed += input_ids[0].tolist()
        logits = np.zeros_like(self._forward(input_ids, *more))
        logits[..., next(self.script, 0)] = 1.0
        return logits


@pytest.fixture
def scripted(talker: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted(talker)
    monkeypatch.setattr(talker.backend, "forward", script.forward)
    return script


def speaking(model: runtime.Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tokenizer of a kind with a chat template, put into ``model``."""
    tokenizer = tiny_tokenizer(kind)
    assert len(tokenizer) <= model.manifest.vocab_size
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    monkeypatch.setitem(model.__dict__, "tokenizer", tokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "mark first", "mark always", "mark never", "mark by a normaliser"])
def test_turns_have_the_tokens_of_the_whole_conversation(
    talker: runtime.Model, kind: str, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each of them is fed once."""
    tokenizer = speaking(talker, kind, monkeypatch)
    end = tokenizer.eos_token_id
    conversation = talker.conversation(max_new_tokens=20, end_token=("</s>",))
    messages: list[dict[str, str]] = []
    for question, answer in (("hi", "Hello the"), ("and the?", "the \u4f60\u597d\nHello"), ("yo", "Hello")):
        messages.append({"role": "user", "content": question})
        before = rendered(talker, messages)
        messages.append({"role": "assistant", "content": answer})
        after = encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
        assert after[: len(before)] == before
        ids = after[len(before) : len(after) - 1 - after[::-1].index(end)]
        scripted.script = iter([*ids, end])
        assert list(collect(conversation.ask(question), [question])[0].token_ids) == ids
        assert scripted.fed == before + ids
    assert conversation.messages == messages


@pytest.mark.parametrize("kind", ["bytes", "mark first"])
def test_an_answer_in_unusual_tokens_keeps_them_if_they_say_the_same(
    talker: runtime.Model, kind: str, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which they do not with a special token among them: the conversation has it nowhere."""
    tokenizer = speaking(talker, kind, monkeypatch)
    end, special = tokenizer.convert_tokens_to_ids(["</s>", "<|user|>"])
    letters = tokenizer.convert_tokens_to_ids(list("the") if kind == "bytes" else [f"<0x{b:02X}>" for b in b"the"])
    usual = encode(tokenizer, "</s>\nthe")[2:]
    assert usual != letters
    for said, kept in ((letters, letters), ([special, *letters], usual)):
        conversation = talker.conversation(max_new_tokens=20, end_token=("</s>",))
        scripted.script = iter([*said, end, end])
        answer = collect(conversation.ask("hi"), ["hi"])[0]
        assert answer.text == "the"
        read = conversation.prefilled_tokens
        list(conversation.ask("yo"))
        whole = rendered(talker, conversation.messages[:-1])
        first = len(rendered(talker, conversation.messages[:1]))
        assert conversation._prefix.ids == whole[:first] + kept + whole[first + len(usual) :]
        if kept is said:
            assert conversation.prefilled_tokens - read == len(whole) - first - len(usual)
