"""Process reward models: a language model that predicts, at a placeholder token after each step, whether the step is good.

The prediction is made AT the placeholder: its own hidden state predicts the label as the next token, which is not in the text. The
stream ``labels`` holds, at the placeholders (the tokens in the loss), the label's token id, or for soft labels the probability of
the positive token. Shape letters: K placeholders, R reward tokens.

Lightman et al. 2023, arXiv 2305.20050; soft labels from rollouts: Wang et al. 2023 (Math-Shepherd), arXiv 2312.08935.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from togi.batch import Batch, moved
from togi.learn.objective import Loss, Objective, sequence_means, token_metrics
from togi.model.policy import LABELS, Needs, Outputs
from togi.obs import names


@dataclass(frozen=True, slots=True)
class StepRewardObjective(Objective):
    """Cross-entropy at the placeholders, a mean over the placeholders of the step, in nats.

    Without ``reward_token_ids`` over the whole vocabulary; with them over those tokens only. ``soft``: exactly two
    tokens, positive first, with the target distribution [p, 1 - p]. Metrics: loss and accuracy, the share of
    placeholders where the most likely token (of those compared) is the label, or the more likely of the two targets.
    """

    reward_token_ids: tuple[int, ...] | None = None
    soft: bool = False

    def __post_init__(self) -> None:
        ids = self.reward_token_ids
        assert not self.soft or (ids is not None and len(ids) == 2), "soft labels need exactly two --reward_tokens"
        assert ids is None or (len(ids) >= 2 and len(set(ids)) == len(ids)), "--reward_tokens must be different tokens"

    @property
    def needs(self) -> Needs:
        if self.reward_token_ids is None:
            return Needs(label_logprobs=True)
        return Needs(next_logits=self.reward_token_ids)

    def count(self, batch: Batch) -> float:
        if self.reward_token_ids is not None and not self.soft:
            targets_KR = self._targets(batch.host.streams[LABELS], self.reward_token_ids)
            assert bool(targets_KR.any(1).all()), "a label is not one of the reward tokens"
        return float(batch.targets_K.numel())

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return sequence_means(self._losses(outputs, batch)[0], batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        loss_K, hits_K = self._losses(outputs, batch)
        total = loss_K.sum()
        sums = {names.LOSS: total, names.ACCURACY: hits_K.sum()}
        return Loss(total, token_metrics(sums, loss_K.numel(), {}))

    def _losses(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross-entropy at each placeholder, and whether its prediction is right, both of shape (K)."""
        if self.reward_token_ids is None:
            return -outputs.label_logprobs_K, outputs.label_hits_K
        logprobs_KR = outputs.next_logits_KR.log_softmax(1)
        targets_KR = self._targets(batch.streams[LABELS], self.reward_token_ids).to(logprobs_KR.dtype)
        return -(targets_KR * logprobs_KR).sum(1), logprobs_KR.argmax(1) == targets_KR.argmax(1)

    def _targets(self, labels_K: Tensor, ids: tuple[int, ...]) -> Tensor:
        """The target distribution over the reward tokens, shape (K, R)."""
        if self.soft:
            return torch.stack([labels_K, 1 - labels_K], dim=1)
        return labels_K.long()[:, None] == moved(torch.tensor(ids), labels_K.device)
