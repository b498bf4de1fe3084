"""The forward of the two model roles, policy and scalar model: a ``Batch`` in, ``Outputs`` out.

Shape letters: T packed tokens, K tokens in the loss, N sequences, H hidden size; t and k: those computed on this rank. Without a
ring (``ring_layout``) a rank computes all of them.

The module's own ``forward`` does everything, heads included. A sharding back end gathers the root's parameters only there: FSDP2
shards each decoder layer, and the embedding and the heads belong to the root. Not here: loading and writing model folders
(``loading``, ``checkpoint``), losses (``algo``).

``Needs``: what an objective requests from a forward. ``Outputs``: what the forward returns.

Shape letters: K tokens in the loss, sequence by sequence (``Batch.targets_K``), U the same packed tokens, each once, N sequences,
H hidden size, R the tokens of ``Needs.next_logits``, M layers with experts, C experts chosen for a token.

Checkpoint names of tensors, which model folders and weight updates to generation engines use.

In memory Transformers may hold tensors in another form (all experts of a layer in one tensor), and Togi's modules add a prefix.
``checkpoint_tensors`` reverts both, one decoder layer at a time, so that a large model streams.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ModelOutput

from togi.algo.balance import balance_loss, routing_sums
from togi.algo.policy import chosen_experts
from togi.algo.precision import full_precision
from togi.batch import Batch
from togi.config.architectures import MIXTURES
from togi.config.choices import Divergence
from togi.model import heads
from togi.model.heads import Head, LogitTransform, TeacherLogits
from togi.model.ring_attention import RING, refuse_ring
from togi.model.ring_layout import Layout, Places, Ring, RingLayout
from togi.weights.files import Reader, nothing_left

LABELS = "labels"
"""The stream that holds, at each token in the loss, the id of the token that should follow (``Needs.label_logprobs``)."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the forward must compute. Outputs that are not requested are not computed.

    ``label_logprobs`` and ``next_logits`` (ids of a few tokens) are predictions at a token in the loss about the token that
    follows it; all others are about the token itself. ``states`` requests hidden states in place of log-probs. ``balance`` and
    ``routes`` are for a mixture of experts only, and can be added to any of the others.
    """

    logprobs: bool = False
    entropy: bool = False
    values: bool = False
    scores: bool = False
    label_logprobs: bool = False
    next_logits: tuple[int, ...] = ()
    states: bool = False
    balance: bool = False
    routes: bool = False


_empty = partial(torch.empty, 0)


@dataclass(frozen=True, eq=False)
class Outputs:
    """Results of one forward over a ``Batch``, all float32 (float64 from a float64 model).

    ``logprobs_K[k]``: log-probability of token ``targets_K[k]`` given its own sequence before it, of logits / temperature.
    ``entropy_K[k]``: entropy of that distribution in nats (differentiable). ``values_K[k]``: the value of the state in which that
    token is chosen. ``scores_N``: the scalar head at each sequence's last token.
    ``label_logprobs_K[k]``: log-probability of the label as the token after ``targets_K[k]``; ``label_hits_K`` (bool):
    whether the label is the likeliest token there. ``next_logits_KR``: the logits of the tokens of ``Needs.next_logits`` there.
    ``divergence_K[k]``: divergence of the distribution of token ``targets_K[k]`` from a teacher's, in nats.
    ``balance_N``: the load-balancing loss of each sequence (``togi.algo.balance``).
    ``routes_KMC`` (int64): the experts to which token ``targets_K[k]`` itself is routed, in each layer.
    ``states_uH``: the hidden states from which ``logprobs_K`` is computed, in the model's own dtype, each token once; in a ring
    only those of this rank (``ring_layout``).
    A field that was not requested is an empty tensor.
    """

    logprobs_K: Tensor = field(default_factory=_empty)
    entropy_K: Tensor = field(default_factory=_empty)
    values_K: Tensor = field(default_factory=_empty)
    scores_N: Tensor = field(default_factory=_empty)
    label_logprobs_K: Tensor = field(default_factory=_empty)
    label_hits_K: Tensor = field(default_factory=_empty)
    next_logits_KR: Tensor = field(default_factory=_empty)
    divergence_K: Tensor = field(default_factory=_empty)
    states_uH: Tensor = field(default_factory=_empty)
    balance_N: Tensor = field(default_factory=_empty)
    routes_KMC: Tensor = field(default_factory=_empty)


HEAD = "score"
"""Transformers' name for the head of a scalar model."""


def hidden_states(hf: PreTrainedModel, layout: Layout) -> Tensor:
    """One forward of the body over the tokens of this rank. Returns the last hidden states, [t, H]."""
    states_tH: Tensor = _body(hf, layout).last_hidden_state[0]
    return states_tH


def _body(hf: PreTrainedModel, layout: Layout, **more: object) -> ModelOutput:
    return hf.base_model(
        input_ids=layout.tokens_t[None],
        position_ids=layout.positions_t[None],
        attention_mask=None,
        use_cache=False,
        segments=layout.segments,
        **more,
    )


def sources(batch: Batch) -> Tensor:
    """Packed index of the token before each token in the loss, each once (int64, [U])."""
    return batch.sources_T[batch.targets_U]


class _Model(nn.Module):
    """``is_adapted``: the weights are frozen and only LoRA adapters are trained (``togi.model.adapters``).

    ``layout_of``: the tokens of a batch that this rank computes: all of them, unless it has joined a ring. ``read``: loads the
    weights of a part that are still on disk (``togi.model.deferred``).
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.is_adapted = False
        self.read: Reader = nothing_left
        self.layout_of: Callable[[Batch], Layout] = Layout.whole

    def join_ring(self, ring: Ring, head_stride: int) -> None:
        """Split the tokens of each batch over the ranks of ``ring`` from now on. All its ranks must call the model together.

        Every rank gets the same outputs, and back-propagates only its share of the loss. ``head_stride``: key/value heads sent
        at a time, a divisor of their number. Raises ModelError if the model does not support ring attention.
        """
        refuse_ring(self.hf.config, head_stride)
        self.layout_of = partial(RingLayout.of, ring=ring, head_stride=head_stride)
        self.hf.set_attn_implementation(RING)

    @property
    def is_mixture(self) -> bool:
        """Whether the model is a mixture of experts whose router can be balanced."""
        return self.hf.config.model_type in MIXTURES

    def _states(self, layout: Layout, batch: Batch, needs: Needs) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states, [t, H], and for a mixture of experts the requested outputs about its routing."""
        if not (needs.balance or needs.routes):
            return hidden_states(self.hf, layout), {}
        assert self.is_mixture, "a dense model has no router"
        output = _body(self.hf, layout, output_router_logits=True)
        states_tH, top_k = output.last_hidden_state[0], self.hf.config.num_experts_per_tok
        segments, routing = len(batch.segments), dict[str, Tensor]()
        if needs.balance:
            # sums over each segment: a prefix counts in every sequence that continues it. The last row is for filler tokens
            own_2SE = routing_sums(output.router_logits, top_k, layout.segments_of(batch), segments + 1)[:, :segments]
            routing["balance_N"] = balance_loss(layout.total(own_2SE), top_k, batch.chains_NS())
        if needs.routes:
            places = layout.at(batch, lambda own: own.targets_U)
            # the routing of a token is at the token itself, not at its source
            routes_uMC = places.states(chosen_experts(output.router_logits, top_k))
            routing["routes_KMC"] = batch.for_each(places.whole(routes_uMC))
        return states_tH, routing


class PolicyModel(_Model):
    """A causal language model whose forward returns log-probabilities and entropies of the tokens in the loss.

    ``hf`` is the Transformers model; its attention must be one of ``togi.model.attention``.
    """

    def __init__(self, hf: PreTrainedModel, transform: LogitTransform | None = None) -> None:
        super().__init__(hf)
        self.transform = transform or LogitTransform()

    @property
    def vocabulary(self) -> int:
        """The number of tokens of the head, padding rows included."""
        return len(self._head.weight_VH)

    def end_answers_with(self, token_ids: Sequence[int]) -> None:
        """Add end tokens to those in the generation config that is saved with the model."""
        generation = self.hf.generation_config
        named = generation.eos_token_id
        named = [] if named is None else [named] if isinstance(named, int) else named
        ends = sorted({*named, *token_ids})
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends

    def forward(
        self, batch: Batch, needs: Needs, temperature: float = 1.0, teacher: TeacherLogits | None = None
    ) -> Outputs:
        """Only tokens in the loss pass through the LM head, once each. A batch without any gives empty results with a graph.

        ``temperature`` divides the logits. With a ``teacher`` the outputs are log-probs and the divergence from the teacher.
        """
        assert not (needs.values or needs.scores), "a policy has no scalar head"
        layout = self.layout_of(batch)
        states_tH, routing = self._states(layout, batch, needs)
        # predictions about the token that follows: made at the tokens in the loss themselves
        if needs.label_logprobs or needs.next_logits:
            assert not (needs.logprobs or needs.entropy or needs.states), "ask for tokens or for what follows them"
            return Outputs(
                **self._what_follows(states_tH, layout.at(batch, lambda own: own.targets_K), batch, needs), **routing
            )
        if not (needs.logprobs or needs.entropy or needs.states):
            return Outputs(**routing)
        # predictions about the tokens in the loss: made at the token before, the source
        places = layout.at(batch, sources)
        states_uH = places.states(states_tH)
        if needs.states:
            return Outputs(states_uH=states_uH, **routing)
        tokens_u = places.own(batch.tokens_T[batch.targets_U])
        if teacher is not None:
            assert not needs.entropy, "there is no entropy beside a divergence"
            pair = heads.distill_logprobs(states_uH, self._head, tokens_u, teacher, temperature=temperature)
            logprobs_K, divergence_K = (batch.for_each(places.whole(part_u)) for part_u in pair)
            return Outputs(logprobs_K=logprobs_K, divergence_K=divergence_K, **routing)
        logprobs_u, entropy_u = heads.token_logprobs(
            states_uH, self._head, tokens_u, temperature=temperature, entropy=needs.entropy
        )
        found = {"entropy_K": batch.for_each(places.whole(entropy_u)) if needs.entropy else entropy_u}
        if needs.logprobs:
            found["logprobs_K"] = batch.for_each(places.whole(logprobs_u))
        return Outputs(**found, **routing)

    def logits_of(self, states_uH: Tensor, kind: Divergence) -> TeacherLogits:
        """This model as a teacher, from hidden states that its forward returned for ``Needs(states=True)``.

        The head is read outside of a forward, so it must be whole on this rank: a teacher cannot be sharded.
        """
        weight_VH, bias_V = self._head.weight_VH.detach(), self._head.bias_V
        assert type(weight_VH) is Tensor, "the teacher's head is sharded"
        head = Head(weight_VH, None if bias_V is None else bias_V.detach(), self.transform)
        return TeacherLogits(states_uH.detach(), head, kind)

    def _what_follows(self, states_tH: Tensor, places: Places, batch: Batch, needs: Needs) -> dict[str, Tensor]:
        """Predictions at the tokens in the loss about the token after each, by the names of ``Outputs``."""
        states_kH = places.states(states_tH)
        if needs.next_logits:
            return {"next_logits_KR": places.whole(heads.some_logits(states_kH, self._head, needs.next_logits))}
        # sequences that share a token may differ in its label, so it is computed for each of them
        # streams are float32, which holds every id below 2^24 exactly; a dummy batch has no tokens and no streams
        labels_K = batch.streams[LABELS].long() if len(batch.picks_K) > 0 else batch.tokens_T[:0]
        labels_k = places.own(labels_K)
        logprobs_k, _ = heads.token_logprobs(states_kH, self._head, labels_k)
        hits_k = heads.top_tokens(states_kH, self._head) == labels_k
        return {"label_logprobs_K": places.whole(logprobs_k), "label_hits_K": places.whole(hits_k.byte()).bool()}

    @property
    def _head(self) -> Head:
        layer = self.hf.get_output_embeddings()
        return Head(layer.weight, layer.bias, self.transform)


class ScalarModel(_Model):
    """A body with one linear output: a critic (value of each state) or a reward model (score of each sequence).

    ``hf`` is a Transformers sequence classification model with one label. ``value_head_prefix`` is the name of the head
    in the checkpoint. ``reward_mean`` and ``reward_std`` are the reward statistics in the config for ``--normalize_reward``
    (0 and 1 if never measured). The model does not apply them.
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
        """Store the mean and the standard deviation of rewards in the config, which is saved with the model."""
        self.hf.config.mean, self.hf.config.std = mean, std

    def forward(self, batch: Batch, needs: Needs, temperature: float = 1.0) -> Outputs:
        """``temperature`` is ignored on purpose: a value is not a distribution."""
        own = Needs(values=needs.values, scores=needs.scores, balance=needs.balance)
        assert needs == own, "a scalar model has no token distribution"
        layout = self.layout_of(batch)
        states_tH, routing = self._states(layout, batch, needs)
        values_K = scores_N = states_tH.new_empty(0, dtype=torch.float32)
        if needs.values:
            # the value of a token is that of the state before it, its source
            values_K = batch.for_each(self._at(layout.at(batch, sources), states_tH))
        if needs.scores:
            scores_N = self._at(layout.at(batch, Batch.last_tokens_N), states_tH)
        return Outputs(values_K=values_K, scores_N=scores_N, **routing)

    def _at(self, places: Places, states_tH: Tensor) -> Tensor:
        return places.whole(self._head(places.states(states_tH)))

    def _head(self, states: Tensor) -> Tensor:
        return full_precision(self.hf.score(states).squeeze(-1))


_PREFIX = "hf."
_LAYER = re.compile(r"^.*?\.\d+\.")


def checkpoint_tensors(
    model: PolicyModel | ScalarModel, named_tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) for the full parameters of ``model``, which come by the model's own names.

    Tied copies are skipped. The tensors of one decoder layer must follow each other, as ``named_parameters`` and ``state_dict``
    yield them. Names are sorted within a layer. The results may be views of the inputs.
    """
    plain = ((name.removeprefix(_PREFIX), tensor) for name, tensor in named_tensors)
    kept = ((name, tensor) for name, tensor in plain if name not in model.hf.all_tied_weights_keys)
    # a conversion may need all tensors of a layer, such as all its experts
    for _, layer in groupby(kept, key=lambda item: _LAYER.findall(item[0])):
        for name, tensor in sorted(revert_weight_conversion(model.hf, dict(layer)).items()):
            is_head = isinstance(model, ScalarModel) and name.startswith(f"{HEAD}.")
            yield (f"{model.value_head_prefix}{name.removeprefix(HEAD)}" if is_head else name), tensor
