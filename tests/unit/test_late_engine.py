"""The message of a weight update that did not end in time names the engine that is late, in each of its stages."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from togi.errors import WeightSyncError
from togi.plan.placement import Carrier, Route
from togi.weights.buckets import Manifest, TensorSpec
from togi.workers.ray import weight_sync
from togi.workers.ray.weight_sync import WeightSync

TENSORS = Manifest(3, (TensorSpec("w", (2,), "float32"),))


class Called:
    """Workers that answer at once, but for one that never answers one method."""

    def __init__(self, count: int, late: str = "") -> None:
        self._count, self._late = count, late
        bucket = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: (1, "parcel")))
        self.handles = [SimpleNamespace(next_bucket=bucket)] * count

    def __len__(self) -> int:
        return self._count

    async def call(self, index: int, method: Any, *arguments: object) -> object:
        if method.__name__ == self._late and index == 1:
            await asyncio.sleep(60)
        return TENSORS if method.__name__ == "begin_export" else "checksum"


@pytest.mark.parametrize("late", ["begin_update", "load_bucket", "finish_update"])
def test_only_the_late_engine_is_named(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    async def at_once(ref: object, _: str) -> object:
        return ref

    monkeypatch.setattr(weight_sync, "result_of", at_once)
    sync = WeightSync(Called(1), Called(3, late), Route(Carrier.HOST), 0.2)  # type: ignore[arg-type]
    with pytest.raises(WeightSyncError) as caught:
        asyncio.run(sync.send(3))
    message = str(caught.value)
    assert "engine 1" in message
    assert "engine 0" not in message
    assert "engine 2" not in message
