"""ORPO: supervised fine-tuning and a preference in one loss, without a reference. The loss is in ``preference``.

Hong et al. 2024, arXiv 2403.07691.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from togi.config.fields import Count, PathText, Positive, flag
from togi.methods.method import REWARD_MEASURES, Good, Measure, Pairs
from togi.obs import names

if TYPE_CHECKING:
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class ORPO(Pairs):
    """Odds ratio preference optimisation: learn the chosen response, and prefer it to the rejected one."""

    command = "orpo"
    summary = "supervised fine-tuning with a preference in one loss: ORPO"
    title = "odds ratio preference optimisation (ORPO)"
    measures = (
        *REWARD_MEASURES,
        Measure(names.CHOSEN_NLL, Good.LOW),
        Measure(
            "log_odds_ratio",
            Good.HIGH,
            "Mean log of the odds of the preferred response over those of the rejected one, by their probability a token.",
        ),
    )
    number = "reward"
    implicit_prompt = True

    odds_ratio_coef: Positive = flag(0.1, "The paper's lambda: weight of the preference beside the supervised loss.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_orpo", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_orpo", "Weights & Biases project.")

    def objective(self, material: Material) -> Objective:
        from togi.methods.preference import ORPOObjective

        return ORPOObjective(self.odds_ratio_coef)
