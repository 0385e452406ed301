"""One ordinary answer and four side by side from an exported artifact, with its size, its parity and its speed."""

from pathlib import Path

import click

from pos2d import runtime
from pos2d.manifest import read_manifest

ONE = "What is a volcano?"
# From the held-out questions: the adapter was not trained on them.
FOUR = (
    "What is the capital of Japan?",
    "How do I cook pasta?",
    "What is the opposite of young?",
    "Use the word quiet in a sentence.",
)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
def show(artifact: Path) -> None:
    """Run ARTIFACT, an exported demo model."""
    manifest = read_manifest(artifact)
    if manifest.parity is not None:
        parity = manifest.parity
        than = "the merged model" if manifest.graph_quant is None else "float activations"
        click.echo(
            f"\nSize    {manifest.total_bytes / 1e6:.0f} MB in {manifest.dtype}, "
            f"{manifest.adapters[0]['file']} (rank {manifest.adapters[0]['ranks'][0]}) merged in"
            f"\nParity  largest logit difference to {than} {parity['max_abs_diff']:.1e} "
            f"({parity['max_rel_diff']:.1e} of the largest logit), top token agrees on {parity['top1_agreement']:.1%}"
        )
    for title, prompts in (("One question", (ONE,)), ("Four questions, answered in the same columns", FOUR)):
        report = runtime.run(artifact, prompts, max_new_tokens=48)
        click.echo(f"\n{title}: {report.new_tokens} tokens at {report.tokens_per_second:.1f} tokens/s")
        for completion in report.completions:
            click.echo(f"  {completion.prompt}\n    {completion.text.strip()}")


if __name__ == "__main__":
    show()
