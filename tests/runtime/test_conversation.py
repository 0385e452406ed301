"""A conversation: what a turn reads, what an interruption leaves, and questions that branch off it."""

from typing import Any

import pytest

from pos2d import runtime
from pos2d.errors import InputError, UsageError
from pos2d.runtime.text.completions import collect

QUESTIONS = ["one", "and two", "a third"]
TRIMMING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETTING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}\n{% else %}<said>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokens(model: runtime.Model, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text).input_ids
    return ids


def heard_ids(model: runtime.Model, heard: list[runtime.Event]) -> list[int]:
    """The tokens of an answer as they were written, or where a character was cut, those of the text that was shown."""
    written = [event.token for event in heard if event.token is not None]
    shown = "".join(event.text for event in heard)
    return written if model.tokenizer.decode(written, skip_special_tokens=True) == shown else tokens(model, shown)


def say(conversation: runtime.Conversation, question: str) -> runtime.Completion:
    return collect(conversation.ask(question), [question])[0]


@pytest.mark.parametrize("ending", ["length", "stop"])
def test_a_turn_reads_only_what_is_new(talker: runtime.Model, ending: str) -> None:
    """Counted in tokens, and the answer is that of the whole conversation read anew."""
    end: Any = {}
    if ending == "stop":
        said = talker.generate("one", max_new_tokens=12)[0].token_ids
        end = {"end_token": tuple(talker.tokenizer.convert_ids_to_tokens([said[7]]))}
    conversation = talker.conversation(max_new_tokens=12, **end)
    ids: list[int] = []
    answer: runtime.Completion | None = None
    read = 0
    for turn, question in enumerate(QUESTIONS):
        # The last token of an answer that came to its greatest length was never read.
        left = 1 if answer is not None and answer.finish_reason == "length" else 0
        between = ("\n" if turn else "") + f"<user>{question}\n<assistant>"
        ids += tokens(talker, between)
        answer = say(conversation, question)
        assert conversation.prefilled_tokens - read == len(tokens(talker, between)) + left
        read = conversation.prefilled_tokens
        assert [list(answer.token_ids)] == talker.generate_ids(
            [ids],
            max_new_tokens=12,
            eos_token_ids=talker.tokenizer.convert_tokens_to_ids(list(end.get("end_token", ()))) or None,
        )
        ids += answer.token_ids
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"] * 3


def test_the_system_turn_comes_first(talker: runtime.Model) -> None:
    conversation = talker.conversation([{"role": "system", "content": "be brief"}], max_new_tokens=6)
    expected = talker.generate_ids([tokens(talker, "<system>be brief\n<user>one\n<assistant>")], max_new_tokens=6)
    assert [list(say(conversation, "one").token_ids)] == expected
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert [list(talker.chat(turns, max_new_tokens=6).token_ids)] == expected


@pytest.mark.parametrize("at", [1, 3])
def test_an_answer_that_is_left_is_kept_as_far_as_it_came(talker: runtime.Model, at: int) -> None:
    conversation = talker.conversation(max_new_tokens=12)
    events = conversation.ask("one")
    heard = [next(events) for _ in range(at)]
    events.close()
    assert conversation.messages[-1]["content"] == "".join(event.text for event in heard)
    ids = tokens(talker, "<user>one\n<assistant>") + heard_ids(talker, heard)
    after = say(conversation, "and two")
    assert [list(after.token_ids)] == talker.generate_ids(
        [ids + tokens(talker, "\n<user>and two\n<assistant>")], max_new_tokens=12
    )


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interruption_within_a_step_leaves_a_whole_cache(
    talker: runtime.Model, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted pass has written into the cache already, which nobody must see."""
    conversation = talker.conversation(max_new_tokens=12)
    first = say(conversation, "zero")
    forward, calls = talker.backend.forward, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        result = forward(*given)
        if calls == call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(talker.backend, "forward", interrupted)
        heard: list[runtime.Event] = []
        with pytest.raises(KeyboardInterrupt):
            heard.extend(conversation.ask("one"))
    assert len(heard) == call - 1
    ids = tokens(talker, "<user>zero\n<assistant>") + list(first.token_ids)
    if heard:
        ids += tokens(talker, "\n<user>one\n<assistant>") + heard_ids(talker, heard)
    assert len(conversation.messages) == (4 if heard else 2)
    after = say(conversation, "and two")
    assert [list(after.token_ids)] == talker.generate_ids(
        [ids + tokens(talker, "\n<user>and two\n<assistant>")], max_new_tokens=12
    )


def test_branches_see_the_conversation_and_leave_it_as_it_is(talker: runtime.Model) -> None:
    plain, branched = (talker.conversation(max_new_tokens=8, max_branches=2) for _ in range(2))
    firsts = [say(conversation, "one") for conversation in (plain, branched)]
    messages = list(branched.messages)
    answers = collect(branched.ask_branches(QUESTIONS), QUESTIONS)
    assert branched.messages == messages
    context = tokens(talker, "<user>one\n<assistant>") + list(firsts[0].token_ids) + tokens(talker, "\n")
    asked = [tokens(talker, f"<user>{question}\n<assistant>") for question in QUESTIONS]
    expected = [
        *talker.generate_ids(asked[:2], context, max_new_tokens=8),
        *talker.generate_ids(asked[2:], context, max_new_tokens=8),
    ]
    assert [list(answer.token_ids) for answer in answers] == expected
    read = branched.prefilled_tokens
    assert say(plain, "and two") == say(branched, "and two")
    # The line's end that closes the answer was read for the branches.
    assert branched.prefilled_tokens - read == len(tokens(talker, "<user>and two\n<assistant>"))


def test_branches_before_any_turn_are_a_run(talker: runtime.Model) -> None:
    answers = collect(talker.conversation(max_new_tokens=8).ask_branches(QUESTIONS), QUESTIONS)
    assert answers == talker.generate(QUESTIONS, max_new_tokens=8)


def test_going_back_reads_nothing_that_is_shared(talker: runtime.Model) -> None:
    conversation = talker.conversation(max_new_tokens=6)
    for question in QUESTIONS[:2]:
        say(conversation, question)
    kept = conversation.messages[:2]
    read = conversation.prefilled_tokens
    conversation.reset(kept)
    again = say(conversation, "and two")
    assert conversation.messages[2]["content"] == "and two"
    fresh = talker.conversation(max_new_tokens=6)
    say(fresh, "one")
    assert again == say(fresh, "and two")
    assert conversation.prefilled_tokens - read <= len(tokens(talker, "\n<user>and two\n<assistant>")) + 6


@pytest.mark.parametrize("template", [TRIMMING, FORGETTING], ids=["trims", "forgets"])
def test_templates_that_change_an_answer(talker: runtime.Model, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that trims keeps the answer's own tokens; one that rewrites it is read from there on."""
    monkeypatch.setattr(talker.tokenizer, "chat_template", template)
    conversation = talker.conversation(max_new_tokens=8)
    answer = say(conversation, "one")
    read = conversation.prefilled_tokens
    # A random model rarely says a space: let the remembered answer have some.
    ids = tokens(talker, "<user>one\n<assistant>") + list(answer.token_ids)
    conversation.messages[-1]["content"] = f"  {answer.text.strip()} "
    after = say(conversation, "and two")
    if template is TRIMMING:
        ids += tokens(talker, "\n<user>and two\n<assistant>")
        assert conversation.prefilled_tokens - read <= len(tokens(talker, "\n<user>and two\n<assistant>")) + 1
    else:
        ids = tokens(talker, "<user>one\n<said>\n<user>and two\n<assistant>")
    assert [list(after.token_ids)] == talker.generate_ids([ids], max_new_tokens=8)


def test_an_answer_that_was_cut_at_a_stop_is_read_as_it_stands(talker: runtime.Model) -> None:
    free = talker.generate("one", max_new_tokens=30)[0].text
    conversation = talker.conversation(max_new_tokens=30, stop=(free[6:8],))
    answer = say(conversation, "one")
    assert answer.text == free[: free.index(free[6:8])]
    ids = tokens(talker, f"<user>one\n<assistant>{answer.text}\n<user>and two\n<assistant>")
    (expected,) = talker.generate_ids([ids], max_new_tokens=30)
    after = list(say(conversation, "and two").token_ids)
    assert after
    assert after == expected[: len(after)]


def test_a_turn_that_was_left_open_is_ended_by_the_next(talker: runtime.Model) -> None:
    """There is one cache, so two answers cannot be written at once."""
    conversation = talker.conversation(max_new_tokens=12)
    left = conversation.ask("one")
    heard = [next(left) for _ in range(4)]
    after = say(conversation, "and two")
    assert list(left) == []
    assert [message["content"] for message in conversation.messages[::2]] == ["one", "and two"]
    ids = tokens(talker, "<user>one\n<assistant>") + heard_ids(talker, heard)
    expected = talker.generate_ids([ids + tokens(talker, "\n<user>and two\n<assistant>")], max_new_tokens=12)
    assert [list(after.token_ids)] == expected
    branches = conversation.ask_branches(["a", "b"])
    next(branches)
    conversation.reset()
    assert list(branches) == []
    assert say(conversation, "one") == talker.generate("one", max_new_tokens=12)[0]


@pytest.mark.parametrize("said", ["", " ", "\n", "Tea\n\n"])
def test_only_whole_turns_are_known_again(talker: runtime.Model, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a prompt may begin as an earlier answer did, and still be another text."""
    conversation = talker.conversation(max_new_tokens=8)
    say(conversation, "one")
    conversation._encoded_turns.clear()
    # As if the model had said it, in tokens that nobody else would use.
    conversation.reset()
    list(conversation.ask("one"))
    heard = [runtime.Event(0, token, "") for token in tokens(talker, said)]
    text = "<user>one\n<assistant>"
    conversation.messages.clear()
    conversation._encoded_turns.clear()
    conversation._record_turn(
        {"role": "user", "content": "one"}, text, tokens(talker, text), heard or [runtime.Event(0, None, "")]
    )
    conversation.reset([{"role": "user", "content": "one"}, {"role": "assistant", "content": f"{said} is fine."}])
    expected = tokens(talker, f"{text}{said} is fine.\n<user>and two\n<assistant>")
    assert conversation._encode(f"{text}{said} is fine.\n<user>and two\n<assistant>") == expected


def test_every_turn_draws_anew(talker: runtime.Model) -> None:
    options: Any = {"max_new_tokens": 10, "temperature": 3.0, "seed": 2}
    conversation = talker.conversation(**options)
    first = say(conversation, "one")
    assert first == talker.generate("one", **options)[0]
    conversation.reset(conversation.messages)
    assert say(conversation, "one").token_ids != first.token_ids


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "the question is empty"),
        ("x" * 600, "the model has 512; begin a new one"),
        ({"role": "user"}, "has a role and a content"),
    ],
)
def test_a_refused_turn_changes_nothing(talker: runtime.Model, question: Any, words: str) -> None:
    conversation = talker.conversation(max_new_tokens=6)
    say(conversation, "one")
    before = list(conversation.messages)
    with pytest.raises(InputError, match=words):
        conversation.ask(question)
    assert conversation.messages == before
    assert say(conversation, "and two").token_ids


def test_what_a_conversation_needs(talker: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is not a turn"):
        talker.conversation([{"role": "user", "content": 3}])
    no_lists: tuple[Any, ...] = ([], "hi", {"role": "user", "content": "hi"})
    for messages in no_lists:
        with pytest.raises(InputError, match="must be a list of turns"):
            talker.chat(messages)
    with pytest.raises(InputError, match="the next turn is the user's"):
        talker.chat([{"role": "system", "content": "hi"}])
    with pytest.raises(TypeError, match="no keyword 'temprature'; did you mean 'temperature'"):
        talker.conversation(temprature=1)
    with pytest.raises(UsageError, match="leave `ignore_chat_template` out"):
        talker.conversation(ignore_chat_template=True)
    monkeypatch.setattr(talker.tokenizer, "chat_template", "{{ raise_exception('only poems') }}")
    with pytest.raises(InputError, match="does not accept these messages: only poems"):
        talker.conversation().ask("one")
    monkeypatch.setattr(talker.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="has no chat template"):
        talker.conversation()
