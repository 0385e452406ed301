"""Chat templates in a process of their own: the same texts, and an end to those that have none."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pos2d.errors import InputError
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.templates import Templates
from pos2d.runtime.text.chat_template import render_for_answer, render_questions
from tests.bases import CHAT_TEMPLATE, write_tokenizer
from tests.runtime.http.servers import until

Run = Callable[[Callable[[Templates], Coroutine[Any, Any, None]]], None]
# What a template may do to its server, when a message asks for it.
HOSTILE = (
    "{% if messages[-1]['content'] == 'loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif messages[-1]['content'] == 'memory' %}{{ ('a' * (messages | length * 9999999999)) | length }}"
    "{% elif messages[-1]['content'] == 'long' %}{{ 'a' * 9999 }}"
    "{% elif messages[-1]['content'] == 'refuse' %}{{ raise_exception('not this') }}"
    "{% elif messages[-1]['content'] == 'escape' %}{{ messages.__class__.__mro__[1].__subclasses__() }}"
    "{% endif %}"
) + CHAT_TEMPLATE
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    write_tokenizer(path, chat=True)
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = HOSTILE
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def in_loop(directory: Path) -> Iterator[Run]:
    """Runs functions with one process for templates, which may take 0.3 s of CPU and make 5000 characters."""
    templates = Templates(directory, timeout=0.3, max_characters=5000)
    with asyncio.Runner() as runner:
        runner.run(templates.start())
        yield lambda function: runner.run(function(templates))
        runner.run(templates.close())


def open_files() -> int:
    """The number of files that this process has open, where the system lists them."""
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


CONVERSATIONS: list[list[dict[str, str]]] = [
    [user("hi")],
    [{"role": "system", "content": "be brief"}, user("\u4f60\u597d \U0001f600 \ud800"), user("")],
    [user("hi"), {"role": "assistant", "content": "well, "}],
    [user("hi"), {"role": "assistant", "content": " "}],
]


def test_the_texts_are_those_of_this_process(directory: Path, in_loop: Run) -> None:
    tokenizer = load_tokenizer(directory)

    async def check(templates: Templates) -> None:
        for messages in CONVERSATIONS:
            assert await templates.for_answer(messages, {"x": 1}) == render_for_answer(tokenizer, messages, {"x": 1})
        for earlier in ([], CONVERSATIONS[1][:1], CONVERSATIONS[1]):
            for questions in (["a"], ["a b", "", "a\n"], []):
                expected = render_questions(tokenizer, earlier, questions)
                assert await templates.questions(earlier, questions) == expected

    in_loop(check)


@pytest.mark.parametrize("content", ["refuse", "long", "memory", "escape"])
def test_what_a_template_refuses_is_an_error_and_no_more(in_loop: Run, content: str) -> None:
    async def check(templates: Templates) -> None:
        process = templates._process
        with pytest.raises(InputError, match="chat template"):
            await templates.for_answer([user(content)])
        assert await templates.for_answer([user("hi")]) == "<user>hi\n<assistant>"
        assert templates._process is process

    in_loop(check)


def test_a_template_without_end_is_ended(in_loop: Run) -> None:
    """The loop goes on meanwhile, and requests that wait are answered by the next process."""

    async def check(templates: Templates) -> None:
        await templates.for_answer([user("hi")])
        files, ticks, started = open_files(), 0, time.monotonic()
        looping = asyncio.create_task(templates.for_answer([user("loop")]))
        waiting = asyncio.create_task(templates.for_answer([user("hi")]))
        while not looping.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(RefusedError) as caught:
            await looping
        assert (caught.value.status, caught.value.param) == (422, "messages")
        assert ticks >= 10
        assert time.monotonic() - started < 6
        assert await waiting == "<user>hi\n<assistant>"
        assert open_files() <= files

    in_loop(check)


def test_a_process_that_others_killed_is_not_the_fault_of_the_messages(in_loop: Run) -> None:
    async def check(templates: Templates) -> None:
        await templates.for_answer([user("hi")])
        process = templates._process
        assert process is not None
        process.kill()
        with pytest.raises(RefusedError, match="was killed; send the request again") as caught:
            await templates.for_answer([user("hi")])
        assert (caught.value.status, caught.value.param) == (503, None)
        assert await templates.for_answer([user("hi")]) == "<user>hi\n<assistant>"

    in_loop(check)


def test_a_client_that_goes_away_leaves_no_answer_behind(in_loop: Run) -> None:
    async def check(templates: Templates) -> None:
        gone = [asyncio.create_task(templates.for_answer([user(f"gone {number}")])) for number in range(20)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        assert await templates.for_answer([user("stays")]) == "<user>stays\n<assistant>"
        await asyncio.gather(*gone, return_exceptions=True)

    in_loop(check)


def test_too_many_requests_are_refused(in_loop: Run) -> None:
    async def check(templates: Templates) -> None:
        tasks = [asyncio.create_task(templates.for_answer([user("hi")])) for _ in range(100)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, RefusedError)]
        assert {result.status for result in refused} == {503}
        assert 0 < len(refused) < 50
        assert len({result for result in results if isinstance(result, str)}) == 1

    in_loop(check)


PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from pos2d.runtime.http.templates import Templates

async def main():
    templates = Templates(Path(sys.argv[1]), timeout=60, max_characters=5000)
    await templates.start()
    print(templates._process.pid, flush=True)
    await templates.for_answer([{"role": "user", "content": "loop"}])

asyncio.run(main())
"""


@LINUX
def test_the_process_dies_with_its_server(directory: Path) -> None:
    """Also where that one is killed, and while a template loops."""
    environment = os.environ | {"POS2D_API_KEY": "secret-key"}
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        assert "POS2D_API_KEY" not in child.environ()
        used = child.cpu_times().user
        until(lambda: child.cpu_times().user > used + 0.05)
        server.kill()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    templates = Templates(tmp_path, timeout=1, max_characters=5000)
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        asyncio.run(templates.start())
