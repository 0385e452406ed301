"""Every command of the pages about artifacts, and of new pages, run as it stands there on the real demo model."""

from pathlib import Path

import pytest

from tests.docs.pages import OF_USE, PAGES, run_blocks


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in OF_USE], ids=lambda page: page.stem)
def test_commands_of_the_page(workplace: Path, page: Path) -> None:
    run_blocks(workplace, page)
