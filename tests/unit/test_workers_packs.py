"""Results of packed samples find their way back: packs are filled by length, callers count by place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.data.packing import in_order
from togi.learn.scorer import Scorer
from togi.model.policy import PolicyModel
from togi.parallel.process import World
from togi.sample import Sample
from togi.workers.model_worker import ModelWorker

LENGTHS = (5, 30, 7, 28, 6, 25, 9, 12)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    result = []
    for number, length in enumerate(LENGTHS):
        mask = np.arange(length) >= 2
        result.append(Sample(rng.integers(0, 256, length), mask, 2, f"group{number}"))
    return result


@pytest.mark.parametrize(
    "flags", [["--max_tokens_per_gpu", "40"], ["--no_packing_samples"]], ids=["packs", "one by one"]
)
def test_log_probs_come_back_in_the_order_of_the_samples(flags: list[str]) -> None:
    torch.manual_seed(0)
    worker = ModelWorker()
    worker._config = parse(RLConfig, flags, "rl").config
    scorer = Scorer(PolicyModel(tiny_model("llama")), World.solo(torch.device("cpu")))
    packs = worker._packs(samples(), "auto")
    assert len(packs) > 1
    if flags[0] == "--max_tokens_per_gpu":
        places = [place for batch in packs for place in batch.order_N]
        assert places != sorted(places), "this case must not be in order by chance"
    together = in_order(packs, scorer.logprobs(packs))
    for sample, logprobs in zip(samples(), together, strict=True):
        alone = worker._packs([sample], "auto")
        np.testing.assert_allclose(logprobs, scorer.logprobs(alone)[0], rtol=1e-5, atol=1e-6)
