"""SimPO: preference training without a reference, by the mean logprob of a response. The loss is in ``preference``.

Meng et al. 2024, arXiv 2405.14734.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from togi.config.fields import Count, FromZero, PathText, Positive, flag
from togi.methods.method import REWARD_MEASURES, Good, Measure, Pairs
from togi.obs import names

if TYPE_CHECKING:
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class SimPO(Pairs):
    """Simple preference optimisation: no reference, rewards of the mean log-prob a token."""

    command = "simpo"
    summary = "preference training without a reference: SimPO"
    title = "simple preference optimisation (SimPO)"
    measures = (*REWARD_MEASURES, Measure(names.CHOSEN_NLL, Good.LOW))
    number = "reward"
    implicit_prompt = True

    beta: Positive = flag(2.0, "Scale of the reward: beta x the mean log-prob of a response's tokens.")
    gamma: FromZero = flag(1.0, "Target margin: the chosen response's reward is to be this much higher.")
    learning_rate: FromZero = flag(1e-6, "Peak learning rate.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_simpo", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_simpo", "Weights & Biases project.")

    def objective(self, material: Material) -> Objective:
        from togi.methods.preference import SimPOObjective

        return SimPOObjective(self.beta, self.gamma)
