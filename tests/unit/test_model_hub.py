"""A hub name becomes the cached folder; an unknown one is one sentence. The hub itself is never asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tiny_model
from togi.errors import ModelError
from togi.weights import files

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the model org/tiny, with the hub switched off."""
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    save_tiny_model(repository / "snapshots" / COMMIT, arch="llama")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_a_folder_stays_as_it_is(tmp_path: Path) -> None:
    assert files.local_folder(str(tmp_path)) == str(tmp_path)


def test_a_cached_name_is_its_snapshot(cache: Path) -> None:
    assert Path(files.local_folder("org/tiny")) == cache / "snapshots" / COMMIT


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="'org/none' is no folder and cannot be had from the hub"):
        files.local_folder("org/none")
