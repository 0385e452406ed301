"""The import of bitsandbytes: its logging is silenced, and its absence is an error that names the cure."""

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from pos2d.errors import UsageError
from pos2d.exporter.quantisation import bitsandbytes_library
from pos2d.exporter.quantisation.bitsandbytes_library import bitsandbytes


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    bitsandbytes.cache_clear()
    yield
    bitsandbytes.cache_clear()


def test_its_absence_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        bitsandbytes()


def test_only_its_errors_are_logged_during_the_import(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def import_module(name: str) -> ModuleType:
        logging.getLogger(name).warning("no kernels")
        return ModuleType(name)

    monkeypatch.setattr(bitsandbytes_library, "import_module", import_module)
    assert bitsandbytes() is bitsandbytes()
    assert not caplog.records
    logging.getLogger("bitsandbytes").warning("after the import")
    assert [record.message for record in caplog.records] == ["after the import"]
