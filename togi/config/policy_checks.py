"""Contradictions in the policy loss of ``togi rl`` and in the sync of adapters. Part of ``checks``, which calls it."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.choices import Aggregation, LoraSync, PolicyLossType
from togi.config.hooks import Hook
from togi.config.rl import RLConfig
from togi.config.shared import ModelSettings


def policy_loss_problems(c: RLConfig) -> Iterator[str]:
    """Faults of clip range, aggregation and correction, given the kind of loss."""
    kind, (low, high) = c.policy_loss_type, c.clip_range
    flag = "--eps_clip" if c.eps_clip_low_high is None else "--eps_clip_low_high"
    is_cispo = kind is PolicyLossType.CISPO
    if low <= 0 or high <= 0 or low > 1 or (low == 1 and not is_cispo):
        limit = "at most 1, which is no lower bound" if is_cispo else "below 1"
        yield f"{flag}: the clip range {low:g} {high:g} must be positive and the lower number {limit}."
    if c.dual_clip is not None and is_cispo:
        yield "--dual_clip bounds a ratio that --policy_loss_type cispo bounds already, on both sides: leave it out."
    if c.dual_clip is not None and isinstance(kind, Hook):
        yield f"--dual_clip has no effect with --policy_loss_type {kind}: leave it out."
    if kind is PolicyLossType.GSPO and c.aggregation is not Aggregation.SEQUENCE_MEAN:
        yield (
            f"--policy_loss_type gspo is a mean over sequences of their token means, not --loss_aggregation {c.aggregation}: "
            "leave the second out."
        )
    yield from _correction_problems(c)


def lora_dropout_problems(c: ModelSettings) -> Iterator[str]:
    """Dropout of an adapter whose logprobs are compared with a reference, or with its own earlier ones."""
    if c.lora_dropout > 0:
        yield (
            f"--lora_dropout {c.lora_dropout:g} would put noise into log-probs that are compared with those of a reference or "
            "of earlier weights: leave it out."
        )


def lora_sync_problems(c: RLConfig) -> Iterator[str]:
    """Faults of ``--lora_sync``."""
    if c.lora_sync is LoraSync.AUTO:
        return
    if c.lora_rank == 0:
        yield f"--lora_sync {c.lora_sync} is about an adapter: add --lora_rank, or leave it out."
    elif c.load_in_4bit and c.lora_sync is LoraSync.ADAPTERS:
        yield (
            "--lora_sync adapters with --load_in_4bit would be merged into weights that were never rounded to 4 bits, which are "
            "not those of the trainer: leave --lora_sync out."
        )


def _correction_problems(c: RLConfig) -> Iterator[str]:
    low, high = c.vllm_is_truncated_threshold
    if not 0 <= low < high:
        yield f"--vllm_is_truncated_threshold {low:g} {high:g}: the first number must be at least 0 and below the second."
    changed = [
        f"--{name} {' '.join(f'{bound:g}' for bound in value) if isinstance(value, tuple) else value}"
        for name, value in c.changed("vllm_is_correction_type", "vllm_is_truncated_threshold").items()
    ]
    if changed and not c.enable_vllm_is_correction:
        yield f"{changed[0]} has no effect: add --enable_vllm_is_correction, or leave it out."
    if changed and c.policy_loss_type is PolicyLossType.GSPO:
        yield (
            f"{changed[0]} is about weights of tokens, but --policy_loss_type gspo with --enable_vllm_is_correction takes its "
            "ratio against the engine's log-probs and has none: leave it out."
        )
