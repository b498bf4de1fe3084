"""SimPO by hand and by the formula of its paper (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.learn_tools import policy
from tests.objective_cases import pairs
from tests.objective_tools import LOG2, LOG3, double, history, learner, pair, summary
from togi.algo.preference import simpo_loss
from togi.config.parse import parse
from togi.data.packing import pack
from togi.errors import ConfigError
from togi.methods import check_method
from togi.methods.preference import SimPOObjective
from togi.methods.simpo import SimPO
from togi.model.policy import Outputs


def test_the_loss_by_hand() -> None:
    # rewards 2 x mean: chosen 2 x -log 2, rejected 2 x -(log 2 + log 3 / 2); their difference log 3, the margin 0 or log 3
    chosen, rejected = double(-LOG2), double(-LOG2 - LOG3 / 2)
    assert simpo_loss(chosen, rejected, 2.0, 0.0).item() == pytest.approx(math.log(4 / 3))
    assert simpo_loss(chosen, rejected, 2.0, LOG3).item() == pytest.approx(LOG2)


def test_it_is_the_loss_that_other_trainers_compute() -> None:
    """As CPO with the loss simpo: log-probs averaged over a response, the margin as a share of beta taken from the difference."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -torch.rand(2, 9, generator=generator, dtype=torch.float64) * 5
    beta, gamma = 2.5, 1.4
    logits = chosen - rejected - gamma / beta
    expected = -torch.nn.functional.logsigmoid(beta * logits)
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta, gamma), expected)


def test_a_response_counts_by_its_mean_token() -> None:
    """A response of two tokens and one of one, both at log 2 nats a token, tie: only the margin is left to learn."""
    batch = pack(pair("a", 2, 1), share_prefix=False)
    outputs = Outputs(double(-LOG2 / 2, -3 * LOG2 / 2, -LOG2))
    objective = SimPOObjective(beta=2.0, gamma=LOG3)
    assert objective.count(batch) == 1
    assert summary(objective, outputs, batch) == pytest.approx(
        {
            "loss": math.log(4),
            "chosen_nll": LOG2,
            "accuracy": 0.0,
            "reward/chosen": -2 * LOG2,
            "reward/rejected": -2 * LOG2,
            "reward/margin": 0.0,
        }
    )
    assert objective.judge(outputs, batch).tolist() == pytest.approx([-2 * LOG2] * 2)


def test_it_learns_its_pairs() -> None:
    run = history(learner(policy(), SimPOObjective(2.0, 0.5)), pairs(4))
    assert run[-1]["loss"] < run[0]["loss"] - 0.05
    assert run[-1]["reward/margin"] > run[0]["reward/margin"] + 0.1
    assert run[-1]["accuracy"] == 1.0 > run[0]["accuracy"]


def test_its_settings() -> None:
    config = parse(SimPO, ["--pretrain", "m", "--dataset", "d"], "simpo").config
    assert (config.beta, config.gamma, config.reference, config.teacher) == (2.0, 1.0, "", "")
    objective = config.model_copy(update={"beta": 3.0, "gamma": 0.25})
    assert (objective.beta, objective.gamma) == (3.0, 0.25)
    for flags, sentence in (
        ("--beta 0", "--beta 0: must be greater than 0"),
        ("--gamma -1", "--gamma -1: must be at least 0"),
        ("--input_template {}", "--prompt_key is not set"),
        ("--ref_pretrain m", "Unknown flag --ref_pretrain"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_method(parse(SimPO, f"--pretrain m --dataset d {flags}".split(), "simpo"))
        assert sentence in str(caught.value)
