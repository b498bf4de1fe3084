"""Which sequences a reward model scores in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from togi.sample import Sample
from togi.workers.worker_group import ModelScores


class Group:
    """Scores a sequence by its length, and notes how many came in each call."""

    def __init__(self) -> None:
        self.calls = list[int]()

    async def per_sample(self, method: Callable[..., object], samples: Sequence[Sample]) -> list[np.ndarray]:
        self.calls.append(len(samples))
        await asyncio.sleep(0)
        return [np.array([len(sample.tokens)], dtype=np.float32) for sample in samples]


@pytest.mark.parametrize(("alone", "calls"), [(False, [2, 5]), (True, [2, 2, 3])])
def test_groups_that_wait_share_a_call_unless_rounding_must_not_depend_on_them(alone: bool, calls: list[int]) -> None:
    group = Group()
    scores = ModelScores(group, alone=alone)  # type: ignore[arg-type]

    async def score() -> list[list[float]]:
        asked = [[[1], [1, 2]], [[1, 2, 3], [1]], [[1, 2], [1], [1, 2]]]
        return await asyncio.gather(*(scores.score(sequences) for sequences in asked))

    assert asyncio.run(score()) == [[1, 2], [3, 1], [2, 1, 2]]
    assert group.calls == calls
