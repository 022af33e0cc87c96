"""A finished store, written once, and copies of it to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.data.stores import BAD, PICTURES, skipping, write


@pytest.fixture(scope="session")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished store that nobody changes: 11 samples in shards of 4, 4 and 3."""
    return write(tmp_path_factory.mktemp("finished") / "store")


@pytest.fixture(scope="session")
def pictures_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Likewise, of 11 pictures 6 of which (`BAD`) could not be read."""
    return write(tmp_path_factory.mktemp("pictures") / "store", PICTURES, solve=skipping(PICTURES, BAD))


@pytest.fixture
def copy(store_url: str, tmp_path: Path) -> Path:
    """A copy of that store, to be broken."""
    return Path(shutil.copytree(store_url, tmp_path / "store"))
