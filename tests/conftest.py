"""Every test session keeps its tokenised rows in a folder of its own."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TOGI_CACHE for this process and those it starts; set after test modules have looked for real models there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOGI_CACHE", str(tmp_path_factory.mktemp("togi_cache")))
        yield
