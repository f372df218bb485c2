"""A Hub on loopback, asked by the libraries themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import Hub, go_online


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(tmp_path / "hub")
    go_online(monkeypatch, served.address, tmp_path / "cache")
    yield served
    served.close()
