"""What several commands load in the same way: the tokenizer, and the scores of a reward model in this process."""

from __future__ import annotations

from collections.abc import Sequence

from togi.config.infer import ChatConfig, InferConfig
from togi.config.shared import ModelSettings
from togi.data import chat
from togi.data.packing import in_order, pack_all
from togi.learn.scorer import Scorer
from togi.model.policy import ScalarModel
from togi.reward.scores import Standardization
from togi.workers.worker_group import as_sample


def tokenizer_of(config: ModelSettings | InferConfig | ChatConfig) -> chat.Tokenizer:
    """The tokenizer of ``--pretrain``, with the chat template that the user gave. Raises DataError."""
    template, trust = config.tokenizer_chat_template, config.trust_remote_code
    return chat.load_tokenizer(config.pretrain, chat_template=template, trust_remote_code=trust)


def token_scores(
    scorer: Scorer, sequences: Sequence[Sequence[int]], max_tokens: int, max_sequences: int | None = None
) -> list[float]:
    """The score at the last token of each sequence. Packs without padding have at most so many tokens and sequences."""
    samples = [as_sample(tokens) for tokens in sequences]
    packs = pack_all(samples, max_tokens=max_tokens, max_sequences=max_sequences, share_prefix=False)
    scores: list[float] = in_order(packs, scorer.scores(packs).tolist())
    return scores


def standardization_of(model: ScalarModel, *, normalize: bool) -> Standardization:
    """By the statistics in the model's config with ``--normalize_reward``, else none."""
    return Standardization(model.reward_mean, model.reward_std) if normalize else Standardization()
