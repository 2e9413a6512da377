"""The paths on which the training program is tested in a test's own process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from train.tiny_growths import grow
from train.tiny_runs import on_native_path


@pytest.fixture
def native_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Those of a CPU without Triton's interpreter, on one thread, and no cache but the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with on_native_path():
        yield


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A growth of all three units, and an epoch end to end."""
    out = tmp_path_factory.mktemp("run") / "out"
    with on_native_path():
        grow(out)
    return out
