"""The two model roles' forwards: a ``Batch`` in, ``Outputs`` out.

Shape letters: T packed tokens, K tokens in the loss, N sequences, H hidden size.

Everything happens inside the module's own ``forward``, heads included, so that a sharding back end that gathers the
root's parameters there (FSDP2 on the root and on the decoder layers, the embedding and heads staying with the root)
sees all uses of them. Not here: reading and writing model folders (``loading``), losses (``algo``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from togi.algo.balance import balance_loss
from togi.batch import NO_SEQUENCE, Batch
from togi.config.choices import Divergence
from togi.config.shared import MIXTURES
from togi.model.distill_head import TeacherLogits, distill_logprobs
from togi.model.logprob_head import LogitTransform, full_precision, some_logits, token_logprobs, top_tokens
from togi.model.outputs import LABELS, Needs, Outputs


def hidden_states(hf: PreTrainedModel, batch: Batch) -> Tensor:
    """One forward of the body over the pack: [T, H]."""
    states_TH: Tensor = _body(hf, batch).last_hidden_state[0]
    return states_TH


def _body(hf: PreTrainedModel, batch: Batch, **more: Any) -> Any:
    return hf.base_model(
        input_ids=batch.tokens_T[None],
        position_ids=batch.positions_T[None],
        attention_mask=None,
        use_cache=False,
        segments=batch.segments,
        **more,
    )


def last_tokens(batch: Batch) -> Tensor:
    """Packed index of the last token of each sequence (int64, N)."""
    owned = (batch.sequences_T != NO_SEQUENCE).nonzero().squeeze(-1)
    last_N = torch.full((batch.num_sequences,), -1, device=owned.device)
    last_N.scatter_reduce_(0, batch.sequences_T[owned], owned, "amax")
    return last_N


class _Model(nn.Module):
    """``is_adapted``: the weights are frozen and LoRA adapters beside them are trained (``togi.model.adapters``)."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.is_adapted = False

    @property
    def is_mixture(self) -> bool:
        """Whether it is a mixture of experts whose router can be balanced."""
        return self.hf.config.model_type in MIXTURES

    def _states(self, batch: Batch, needs: Needs) -> tuple[Tensor, Tensor]:
        """Hidden states, [T, H], and the load-balancing loss of each sequence (empty if not asked for)."""
        if not needs.balance:
            states_TH = hidden_states(self.hf, batch)
            return states_TH, states_TH.new_empty(0)
        assert self.is_mixture, "a dense model has no router"
        output = _body(self.hf, batch, output_router_logits=True)
        config: Any = self.hf.config
        balance_N = balance_loss(
            output.router_logits, config.num_experts_per_tok, batch.segments_T(), batch.chains_NS()
        )
        return output.last_hidden_state[0], balance_N


class PolicyModel(_Model):
    """A causal language model that answers with log-probabilities and entropies of the tokens in the loss.

    ``hf`` is the Transformers model; its attention must be one of ``togi.model.attention``.
    """

    def __init__(self, hf: PreTrainedModel, transform: LogitTransform | None = None) -> None:
        super().__init__(hf)
        self.transform = transform or LogitTransform()

    @property
    def vocabulary(self) -> int:
        """How many tokens the head knows, padding rows included."""
        return int(self._head.weight.shape[0])

    def forward(
        self, batch: Batch, needs: Needs, temperature: float = 1.0, teacher: TeacherLogits | None = None
    ) -> Outputs:
        """Only tokens in the loss pass through the LM head. A batch without any gives empty, connected results.

        With a ``teacher`` there are log-probs and the divergence from it.
        """
        assert not (needs.values or needs.scores), "a policy has no scalar head"
        states_TH, balance_N = self._states(batch, needs)
        return replace(self._predictions(states_TH, batch, needs, temperature, teacher), balance_N=balance_N)

    def _predictions(
        self, states_TH: Tensor, batch: Batch, needs: Needs, temperature: float, teacher: TeacherLogits | None
    ) -> Outputs:
        targets_K = batch.targets_K
        if needs.label_logprobs or needs.next_logits:
            assert not (needs.logprobs or needs.entropy or needs.states), "ask for tokens or for what follows them"
            return self._what_follows(states_TH.index_select(0, targets_K), batch, needs)
        if not (needs.logprobs or needs.entropy or needs.states):
            return Outputs()
        states_KH = states_TH.index_select(0, batch.sources_T[targets_K])
        if needs.states:
            return Outputs(states_KH=states_KH)
        settings: Any = {"temperature": temperature, "bias_V": self._head.bias, "transform": self.transform}
        weight_VH, tokens_K = self._head.weight, batch.tokens_T[targets_K]
        if teacher is not None:
            assert not needs.entropy, "there is no entropy beside a divergence"
            logprobs_K, divergence_K = distill_logprobs(states_KH, weight_VH, tokens_K, teacher, **settings)
            return Outputs(logprobs_K=logprobs_K, divergence_K=divergence_K)
        logprobs_K, entropy_K = token_logprobs(states_KH, weight_VH, tokens_K, entropy=needs.entropy, **settings)
        return Outputs(logprobs_K, entropy_K) if needs.logprobs else Outputs(entropy_K=entropy_K)

    def logits_of(self, states_KH: Tensor, kind: Divergence) -> TeacherLogits:
        """This model as the teacher at states that it gave for ``Needs(states=True)``.

        Its head must be whole on this rank, since it is read after the forward: a teacher cannot be sharded.
        """
        weight_VJ, bias_V = self._head.weight.detach(), self._head.bias
        assert type(weight_VJ) is Tensor, "the teacher's head is sharded"
        return TeacherLogits(
            states_KH.detach(), weight_VJ, None if bias_V is None else bias_V.detach(), self.transform, kind
        )

    def _what_follows(self, states_KH: Tensor, batch: Batch, needs: Needs) -> Outputs:
        """Predictions made at the tokens in the loss, about the token after each."""
        weight_VH, bias_V = self._head.weight, self._head.bias
        if needs.next_logits:
            return Outputs(next_logits_KR=some_logits(states_KH, weight_VH, needs.next_logits, bias_V, self.transform))
        # float32 holds every id below 2^24 exactly; a dummy of a rank without work has no tokens and no streams
        labels_K = batch.select(LABELS).long() if len(states_KH) > 0 else batch.tokens_T[:0]
        logprobs_K, _ = token_logprobs(states_KH, weight_VH, labels_K, bias_V=bias_V, transform=self.transform)
        hits_K = top_tokens(states_KH, weight_VH, bias_V, self.transform) == labels_K
        return Outputs(label_logprobs_K=logprobs_K, label_hits_K=hits_K)

    @property
    def _head(self) -> Any:
        return self.hf.get_output_embeddings()


class ScalarModel(_Model):
    """A body with one linear output: a critic (value of each state) or a reward model (score of each sequence).

    ``hf`` is a Transformers sequence classification model with one label. ``value_head_prefix`` is the name of the head
    in the checkpoint. ``reward_mean`` and ``reward_std`` are the statistics kept in the config for ``--normalize_reward``
    (0 and 1 if never measured); the model does not apply them.
    """

    def __init__(self, hf: PreTrainedModel, value_head_prefix: str = "score") -> None:
        super().__init__(hf)
        self.value_head_prefix = value_head_prefix

    @property
    def reward_mean(self) -> float:
        return float(getattr(self.hf.config, "mean", 0.0))

    @property
    def reward_std(self) -> float:
        return float(getattr(self.hf.config, "std", 1.0))

    def set_reward_statistics(self, mean: float, std: float) -> None:
        """Keep the mean and the standard deviation of rewards in the config, to be saved with the model."""
        self.hf.config.mean, self.hf.config.std = mean, std

    def forward(self, batch: Batch, needs: Needs, temperature: float = 1.0) -> Outputs:
        """``temperature`` is ignored on purpose: a value is not a distribution."""
        own = Needs(values=needs.values, scores=needs.scores, balance=needs.balance)
        assert needs == own, "a scalar model has no token distribution"
        states_TH, balance_N = self._states(batch, needs)
        empty = states_TH.new_empty(0, dtype=torch.float32)
        values_K, scores_N = empty, empty
        if needs.values:
            values_K = self._head(states_TH.index_select(0, batch.sources_T[batch.targets_K]))
        if needs.scores:
            scores_N = self._head(states_TH.index_select(0, last_tokens(batch)))
        return Outputs(values_K=values_K, scores_N=scores_N, balance_N=balance_N)

    def _head(self, states: Tensor) -> Tensor:
        head: Any = self.hf.score
        return full_precision(head(states).squeeze(-1))


def parameter_count(model: nn.Module) -> int:
    """How many parameters there are; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
