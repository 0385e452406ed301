"""Completions on a terminal: one is printed as it grows, several are shown side by side in panels."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from pos2d.runtime.text.completions import Completion, Event

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from pos2d.runtime.layout_view.picture import Picture

MIN_PANEL_WIDTH = 32
# Lines and columns of a panel's frame.
FRAME_LINES, FRAME_COLUMNS = 2, 4


class Display:
    """Write completions to standard output: live panels on a terminal, plain text anywhere else."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self._ended = [False] * len(prompts)
        self._unclipped = False
        self._live = None
        if len(prompts) > 1 and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._console = Console()
            self._live = Live(console=self._console, get_renderable=self._panels, refresh_per_second=12)

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def show(self, event: Event) -> None:
        """Add the text of an event to its completion."""
        self._texts[event.branch] += event.text
        self._ended[event.branch] = event.finish_reason is not None
        if len(self._prompts) == 1:
            sys.stdout.write(event.text)
            sys.stdout.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            # The last frame stays on the screen, so it shows every line.
            self._unclipped = True
            self._live.vertical_overflow = "visible"
            self._live.stop()
        elif len(self._prompts) == 1 and self._texts[0]:
            # The summary follows on standard error, which may be the same terminal or file.
            sys.stdout.write("\n")
            sys.stdout.flush()

    def finish(self, completions: Sequence[Completion]) -> None:
        """Print the completions that were not shown while they grew."""
        if len(self._prompts) == 1 or self._live is not None:
            return
        for number, completion in enumerate(completions, 1):
            sys.stdout.write(f"[{number}] {completion.prompt}\n{completion.text}\n\n")
        sys.stdout.flush()

    def _panels(self) -> "RenderableType":
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        columns = max(1, min(len(self._prompts), self._console.width // MIN_PANEL_WIDTH))
        rows = -(-len(self._prompts) // columns)
        # A panel that is too small shows its newest lines.
        lines = None if self._unclipped else max(1, self._console.height // rows - FRAME_LINES)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [
            Panel(
                self._tail(Text(text), self._console.width // columns - FRAME_COLUMNS, lines),
                title=Text(prompt.replace("\n", " "), overflow="ellipsis", no_wrap=True),
                border_style="dim" if ended else "none",
            )
            for prompt, text, ended in zip(self._prompts, self._texts, self._ended, strict=True)
        ]
        for first in range(0, len(panels), columns):
            grid.add_row(*panels[first : first + columns])
        return grid

    def _tail(self, text: "Text", width: int, lines: int | None) -> "Text":
        """The last ``lines`` of a text that is wrapped to ``width``."""
        if lines is None:
            return text
        wrapped = text.wrap(self._console, max(1, width))
        return text if len(wrapped) <= lines else type(text)("\n").join(wrapped[-lines:])


def print_layout(picture: "Picture") -> None:
    """Print a layout, as wide as the terminal; with colours where the terminal has them."""
    from rich.console import Console

    from pos2d.runtime.layout_view.text import draw_text

    console = Console(highlight=False)
    console.print(draw_text(picture, console.width), no_wrap=True, overflow="ignore", crop=False)
