"""Ray's start on a busy machine: once more where it was too slow, and no more than once."""

from __future__ import annotations

from typing import Any

import pytest

from togi.plan.machine import Machine
from togi.workers.ray import cluster

SLOW = "The current node timed out during startup. This could happen because the GCS has become overloaded."


@pytest.mark.parametrize(
    ("ends", "starts"),
    [([], 1), ([SLOW], 2), ([SLOW, SLOW], 2), (["no such address"], 1)],
    ids=["at once", "slow", "never", "other"],
)
def test_a_slow_start_is_tried_once_more(monkeypatch: pytest.MonkeyPatch, ends: list[str], starts: int) -> None:
    left, seen = list(ends), list[str]()

    def init(**settings: Any) -> None:
        assert settings["object_store_memory"] == 5 << 30
        seen.append(settings["address"])
        if left:
            raise Exception(left.pop(0))

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    machine = Machine(cpus=2, memory_bytes=0, gpus=0)
    if len(ends) < starts:
        cluster._start(machine, 5 << 30)
    else:
        with pytest.raises(Exception, match=ends[-1]):
            cluster._start(machine, 5 << 30)
    assert seen == ["local"] * starts
