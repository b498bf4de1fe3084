"""Which rows the student answers, and what becomes of a response: counted and laid out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.coded_rows import examples_of
from tests.tiny import STOP, tiny_tokenizer
from togi.data.packing import pack
from togi.data.turns import Coded
from togi.errors import ConfigError
from togi.methods.kd import KD
from togi.parallel.process import World
from togi.run.offline_setup import Data, answered, check_plan, check_ranks, places_to_answer
from togi.run.plan import EpochPlan
from togi.sample import Sample

PLAN = EpochPlan(rows=14, batch=4, epochs=2, seed=3)  # steps of 4, 4, 4 and 2 rows, twice


def row() -> Sample:
    return Sample(np.array([5, 6, 7, 8, 9]), np.arange(5) >= 3, 3, "a", {}, {"generated": 0.0})


def test_the_share_is_exact_over_the_run() -> None:
    """0.3 x 4, 8, 12, 14, 18, ... rows, rounded down: 1, 2, 3, 4, 5, 6, 7 and 8 so far."""
    places = [places_to_answer(PLAN, step, 0.3) for step in range(PLAN.steps)]
    assert [len(each) for each in places] == [1, 1, 1, 1, 1, 1, 1, 1]
    assert sum(len(places_to_answer(PLAN, step, 0.1)) for step in range(PLAN.steps)) == 2  # 2.8 of 28 rows
    assert len({tuple(each) for each in places}) > 1, "always the same place"
    assert places == [places_to_answer(PLAN, step, 0.3) for step in range(PLAN.steps)]


def test_all_rows_or_none() -> None:
    assert [places_to_answer(PLAN, step, 1.0) for step in (0, 3)] == [[0, 1, 2, 3], [0, 1]]
    assert places_to_answer(PLAN, 0, 0.0) == []


def test_a_response_takes_the_place_of_the_data() -> None:
    """A cut one as it is: no end token is added, and none of the data's tokens is left."""
    sample = answered(row(), (42, 43))
    assert sample.tokens.tolist() == [5, 6, 7, 42, 43]
    assert sample.loss_mask.tolist() == [False, False, False, True, True]
    assert (sample.prompt_length, sample.group_id, sample.values) == (3, "a", {"generated": 1.0})


def test_an_empty_response_is_in_the_pack_and_not_in_the_loss() -> None:
    batch = pack([answered(row(), ()), row()], share_prefix=False)
    assert batch.num_sequences == 2
    assert batch.target_sequences_K.tolist() == [1, 1]


def test_a_row_without_a_prompt_cannot_be_answered(tmp_path: Path) -> None:
    """As where one token holds the whole prompt and the start of the answer, which is learned."""
    row = (Coded(np.arange(4, dtype=np.int32), ((0, 4),), 0, merged=True),)
    data = Data(tiny_tokenizer(), (STOP,), examples_of([row], tmp_path), ())
    check_plan(KD(), PLAN, data)
    with pytest.raises(ConfigError, match=r"--on_policy_share.*--dataset without any"):
        check_plan(KD(on_policy_share=0.5), PLAN, data)


def test_vllm_in_one_of_several_processes_is_refused() -> None:
    config = KD(on_policy_share=0.5)
    check_ranks(config, World.solo(torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"--rollout_engine vllm.*one of 2"):
        check_ranks(config, World(0, 2, torch.device("cpu")))
