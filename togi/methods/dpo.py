"""Direct preference optimisation with a reference: DPO, cDPO, IPO. The loss is in ``preference``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from togi.config.fields import Count, FromZero, PathText, Positive, flag
from togi.methods.method import REWARD_MEASURES, Good, HeldToReference, Measure, Pairs
from togi.obs import names

if TYPE_CHECKING:
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class DPO(Pairs, HeldToReference):
    """Direct preference optimisation: DPO, cDPO (--label_smoothing), IPO (--ipo)."""

    command = "dpo"
    summary = "preference training: DPO, cDPO, IPO"
    title = "direct preference optimisation"
    measures = (*REWARD_MEASURES, Measure(names.CHOSEN_NLL, Good.LOW))
    number = "reward"

    beta: Positive = flag(0.1, "Temperature: how strongly the policy is held to the reference.")
    ipo: bool = flag(False, "IPO's squared loss in place of DPO's log-sigmoid.")
    label_smoothing: float = flag(0.0, "cDPO: the share of labels taken to be wrong.", ge=0, lt=0.5)
    nll_loss_coef: FromZero = flag(0.0, "Weight of the chosen response's negative log-likelihood a token.")
    learning_rate: FromZero = flag(1e-5, "Peak learning rate.")
    max_len: Count = flag(512, "At most this many tokens per sequence, prompt and response together.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_dpo", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_dpo", "Weights & Biases project.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        yield from super().problems(template_given=template_given)
        if self.ipo and self.label_smoothing > 0:
            yield "--label_smoothing belongs to DPO's loss but --ipo replaces it: leave one of them out."
        if self.precompute_ref and self.ref_offload:
            yield "--precompute_ref frees the reference before training, so --ref_offload moves nothing: leave one of them out."

    @property
    def scores_ahead(self) -> bool:
        return self.precompute_ref

    def objective(self, material: Material) -> Objective:
        from togi.methods.preference import DPOObjective

        return DPOObjective(self.beta, self.label_smoothing, self.ipo, self.nll_loss_coef)
