"""ORPO by hand and by the formula of its paper (Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.learn_tools import policy
from tests.objective_cases import pairs
from tests.objective_tools import LOG2, LOG3, double, history, learner, pair, summary
from togi.algo.preference import log_odds
from togi.config.parse import parse
from togi.data.packing import pack
from togi.errors import ConfigError
from togi.methods import check_method
from togi.methods.orpo import ORPO
from togi.methods.preference import ORPOObjective
from togi.model.policy import Outputs
from togi.obs import names


def test_odds_by_hand() -> None:
    probabilities = double(0.5, 0.75, 0.1)
    assert log_odds(probabilities.log()).tolist() == pytest.approx([0.0, LOG3, -2 * LOG3])


def test_odds_at_both_ends() -> None:
    """Of a certain response they are finite and do not move it; of a hopeless one they are its log-prob."""
    means_N = torch.tensor([0.0, -1e-9, -80.0], requires_grad=True)
    odds_N = log_odds(means_N)
    odds_N.sum().backward()
    assert torch.isfinite(odds_N).all() and odds_N[2].item() == -80.0
    assert means_N.grad is not None and means_N.grad.tolist() == [0.0, 0.0, 1.0]


def test_it_is_the_loss_that_other_trainers_compute() -> None:
    """The log odds ratio by log1p(-exp), lambda x its log-sigmoid taken from the NLL of the chosen response."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -torch.rand(2, 9, generator=generator, dtype=torch.float64) * 5 - 0.01
    ratios = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    expected = (-chosen - 0.1 * torch.nn.functional.logsigmoid(ratios)).sum()
    batch = pack([sample for i in range(9) for sample in pair(str(i), 1, 1)], share_prefix=False)
    outputs = Outputs(torch.stack([chosen, rejected], dim=1).flatten())
    torch.testing.assert_close(ORPOObjective(0.1).loss(outputs, batch).sum, expected)


def test_a_pair_by_hand() -> None:
    # chosen: two tokens, mean log(3/4), odds 3; rejected: one token at 1/2, odds 1
    batch = pack(pair("a", 2, 1), share_prefix=False)
    outputs = Outputs(double(0.0, 2 * math.log(0.75), -LOG2))
    objective = ORPOObjective(0.5)
    assert objective.count(batch) == 1
    assert summary(objective, outputs, batch) == pytest.approx(
        {
            "loss": math.log(4 / 3) + 0.5 * math.log(4 / 3),
            "chosen_nll": math.log(4 / 3),
            "log_odds_ratio": LOG3,
            "accuracy": 1.0,
            "reward/chosen": -0.5 * math.log(4 / 3),
            "reward/rejected": -0.5 * LOG2,
            "reward/margin": 0.5 * math.log(1.5),
        }
    )
    assert objective.judge(outputs, batch).tolist() == pytest.approx([-0.5 * math.log(4 / 3), -0.5 * LOG2])


def test_it_learns_its_pairs() -> None:
    run = history(learner(policy(), ORPOObjective(1.0)), pairs(4))
    assert run[-1]["loss"] < run[0]["loss"] - 0.5
    assert run[-1]["log_odds_ratio"] > run[0]["log_odds_ratio"] + 0.1
    assert run[-1]["chosen_nll"] < run[0]["chosen_nll"] - 0.5
    assert run[-1]["accuracy"] == 1.0 > run[0]["accuracy"]


def test_its_settings_and_its_own_metric() -> None:
    config = parse(ORPO, ["--pretrain", "m", "--dataset", "d"], "orpo").config
    assert (config.odds_ratio_coef, config.reference, config.teacher) == (0.1, "", "")
    with pytest.raises(ConfigError, match="--odds_ratio_coef 0: must be greater than 0"):
        check_method(parse(ORPO, ["--pretrain", "m", "--dataset", "d", "--odds_ratio_coef", "0"], "orpo"))
    assert names.explain("eval/log_odds_ratio").startswith("On the evaluation data: Mean log of the odds")
