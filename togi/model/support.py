"""Which architectures can be trained packed, and how their logits are computed.

The test suite checks "packed = one by one" for those in ``ARCHITECTURES``. Any other architecture is refused if its class or
config shows a feature that packing breaks. Otherwise it is tested on its own weights when it is loaded: a few tokens must give the
same results packed and through Transformers' own attention.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from togi.batch import NO_PREFIX, Batch, Segments
from togi.config.architectures import ARCHITECTURES
from togi.errors import ModelError
from togi.model.attention import VARLEN
from togi.model.heads import LogitTransform
from togi.model.policy import Needs, PolicyModel, ScalarModel, hidden_states
from togi.model.ring_layout import Layout

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.05}


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """The transform that this architecture applies to its logits: Gemma's cap, Granite's divisor, Cohere's factor."""
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    scale = (1.0 if factor is None else float(factor)) / (1.0 if divisor is None else float(divisor))
    return LogitTransform(scale, 0.0 if softcap is None else float(softcap))


def refuse_other_parts(config: PreTrainedConfig) -> None:
    """Raise ModelError for a model that also takes images or sound, by its config alone."""
    text = config.get_text_config()
    if text is config or config.is_encoder_decoder:
        return
    known = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    alone = f", with the model_type {text.model_type} in its config.json" if known else ""
    raise ModelError(
        f"{config.model_type} models take more than text, and Togi trains language models: give one without the other "
        f"parts{alone}."
    )


def refuse_unsupported(model: PreTrainedModel, attention: str) -> None:
    """Raise ModelError if the class or the config shows a feature that packed training does not support.

    ``model`` may be on the meta device; ``attention`` is the name of the back end that will be used.
    """
    config = model.config
    kind = config.model_type
    layer_types = set(getattr(config, "layer_types", None) or ())
    if model._is_stateful or not layer_types <= _LAYER_TYPES:
        raise ModelError(
            f"{kind} models have layers that carry a state or see chunks of the sequence (linear attention, Mamba), "
            "which would leak between packed sequences: use a model with full or sliding-window attention."
        )
    if not model._supports_attention_backend or config.is_encoder_decoder:
        raise ModelError(f"{kind} models cannot take Togi's packed attention: use a decoder with attention back ends.")
    # PyTorch's kernels, FlashAttention among them, cap no scores
    package = attention == VARLEN and importlib.util.find_spec("flash_attn") is not None
    if getattr(config, "attn_logit_softcapping", None) is not None and not package:
        raise ModelError(
            f"This {kind} model caps its attention scores (attn_logit_softcapping), which takes a CUDA device, --bf16 and "
            "the package flash-attn: pip install flash-attn --no-build-isolation."
        )


def verify_packing(model: PolicyModel | ScalarModel) -> None:
    """Compare a small pack (a shared prompt with two continuations, a plain sequence) with Transformers' own forward.

    Compares the hidden states of each sequence's own segment and, for a policy, its log-probs. The measure is the median over a
    segment's tokens, because a mixture of experts in bf16 may route single tokens differently. The pack must also give the same
    states in training mode; otherwise a random operation is still on. Raises ModelError if anything differs. The model is then
    in evaluation mode.
    """
    batch = _probe_batch(model.hf.config.vocab_size).to(next(model.parameters()).device)
    worst = 0.0
    with torch.no_grad():
        # nothing random in training mode?
        drawn_TH = hidden_states(model.train().hf, Layout.whole(batch))
        packed_TH = hidden_states(model.eval().hf, Layout.whole(batch))
        if not torch.allclose(drawn_TH.float(), packed_TH.float(), rtol=1e-3, atol=1e-3):
            raise ModelError(
                f"{model.hf.config.model_type} models give other results in training than in evaluation, though all dropout "
                f"in their config.json is off: Togi cannot train this architecture; tested ones are {', '.join(ARCHITECTURES)}."
            )
        ours_K = model(batch, Needs(logprobs=True)).logprobs_K if isinstance(model, PolicyModel) else None
        # each sequence alone, as plain Transformers computes it
        attention = model.hf.config._attn_implementation
        model.hf.set_attn_implementation("sdpa" if model.hf._supports_sdpa else "eager")
        for own in (1, 2, 3):
            path = torch.cat([batch.segments.tokens(s) for s in batch.segments.chain(own)])
            tokens, length = batch.tokens_T[path], batch.segments.lengths_S[own]
            stock = model.hf.base_model(input_ids=tokens[None], use_cache=False)
            full = model.hf(input_ids=tokens[None], use_cache=False)
            alone_lH = stock.last_hidden_state[0, -length:].float()
            gap_l = (packed_TH[path[-length:]].float() - alone_lH).norm(dim=-1) / alone_lH.norm(dim=-1)
            worst = max(worst, float(gap_l.median()))
            if ours_K is not None:
                # the log-probs of the last tokens: those in the loss
                ours_k = ours_K[batch.target_sequences_K == own - 1]
                theirs = full.logits[0, :-1].float().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
                worst = max(worst, float((ours_k - theirs[-len(ours_k) :]).abs().median()))
    model.hf.set_attn_implementation(attention)
    if not worst <= _TOLERANCE.get(packed_TH.dtype, 1e-3):
        raise ModelError(
            f"{model.hf.config.model_type} models give other results packed than alone (difference {worst:.2g}): "
            f"Togi cannot train this architecture; tested ones are {', '.join(ARCHITECTURES)}."
        )


def _probe_batch(vocab: int) -> Batch:
    segments = Segments((0, 5, 9, 12), (5, 4, 3, 6), (NO_PREFIX, 0, 0, NO_PREFIX))
    owners = torch.tensor([0] * 4 + [1] * 3 + [2] * 5)
    # the first token of the plain sequence has no token before it
    targets = torch.tensor([*range(5, 12), *range(13, 18)])
    tokens = (torch.arange(18) * 7919 + 13) % vocab
    return Batch.of(tokens, segments, [(1,), (2,), (3,)], targets, owners, {}, {})
