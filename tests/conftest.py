"""Every test session keeps its tokenised rows in a folder of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TOGI_CACHE for this process and those it starts: the models and sets that are there already, but no rows."""
    real = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser()
    own = tmp_path_factory.mktemp("togi_cache")
    for entry in real.iterdir() if real.is_dir() else ():
        if entry.name != "data":
            (own / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOGI_CACHE", str(own))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test whose name holds an address: it differs in each process, so that workers cannot share the tests."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"give these tests fixed names with ids=: {', '.join(unstable[:5])}")
