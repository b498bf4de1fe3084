"""Contradictions between the settings of ``togi sft | rm | dpo | kto | prm | kd``, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.checks import model_problems, output_problems, template_problems, train_problems
from togi.config.choices import EngineName, RewardLoss
from togi.config.offline import (
    PAIRED,
    PROMPTED,
    DPOConfig,
    KDConfig,
    KTOConfig,
    OfflineConfig,
    OnPolicySettings,
    PRMConfig,
    RMConfig,
    SFTConfig,
)
from togi.config.parallel_checks import parallel_problems
from togi.config.parse import Parsed, Source
from togi.config.policy_checks import lora_dropout_problems
from togi.errors import ConfigError


def check_offline(parsed: Parsed[OfflineConfig]) -> None:
    """Raise ConfigError with the first contradiction. Each message names both flags and the way out."""
    config = parsed.config
    for message in _problems(config, template_given=_template_given(parsed)):
        raise ConfigError(message)


def _template_given(parsed: Parsed[OfflineConfig]) -> bool:
    """Whether the user wrote ``--input_template``: its default gives way to a chat template, a wish does not."""
    return parsed.sources.get("input_template", Source.DEFAULT) is not Source.DEFAULT


def _problems(c: OfflineConfig, *, template_given: bool) -> Iterator[str]:
    yield from _required(c)
    if isinstance(c, PROMPTED | PAIRED):
        yield from _rendering(c, template_given=template_given)
    yield from _training(c)
    if isinstance(c, SFTConfig):
        yield from _sft(c)
    if isinstance(c, SFTConfig | KDConfig):
        yield from _pretrain_mode(c, template_given=template_given)
    if isinstance(c, RMConfig):
        yield from _rm(c)
    if isinstance(c, DPOConfig | KTOConfig):
        yield from lora_dropout_problems(c)
    if isinstance(c, DPOConfig):
        yield from _dpo(c)
    if isinstance(c, KTOConfig):
        yield from _kto(c)
    if isinstance(c, PRMConfig):
        yield from _prm(c)
    if isinstance(c, KDConfig):
        yield from _kd(c)
    yield from _output(c)


def _required(c: OfflineConfig) -> Iterator[str]:
    if not c.pretrain:
        yield "--pretrain is required: the Hugging Face folder or hub name of the model to train."
    if not c.dataset:
        yield "--dataset is required: a JSON, JSONL, CSV, Parquet or Arrow file, a saved data set folder or a hub name."
    if isinstance(c, KDConfig) and not c.teacher_model:
        yield "--teacher_model is required: the Hugging Face folder or hub name of the model to learn from."
    if isinstance(c, PRMConfig) and not c.placeholder_token:
        yield "--placeholder_token is required: the token that stands after every step in --input_key."


def _rendering(c: SFTConfig | KTOConfig | KDConfig | RMConfig | DPOConfig, *, template_given: bool) -> Iterator[str]:
    if template_given and c.input_template is not None:
        if c.apply_chat_template:
            yield "--input_template and --apply_chat_template exclude each other: leave one of them out."
        yield from template_problems(c.input_template)
        if "\\n" in c.input_template:
            yield "--input_template contains a backslash followed by n: write a real line break, in bash $'...\\n...'."
    if isinstance(c, PAIRED) and template_given and c.prompt_key is None:
        yield "--input_template goes around the prompt but --prompt_key is not set: set it, or leave the template out."


def _training(c: OfflineConfig) -> Iterator[str]:
    yield from model_problems(c)
    yield from train_problems(c, c)
    yield from parallel_problems(c)
    chat = isinstance(c, PROMPTED | PAIRED) and c.apply_chat_template
    if c.tokenizer_chat_template is not None and not chat:
        yield "--tokenizer_chat_template is only used with --apply_chat_template: add it, or leave the template out."
    if c.tokenizer_chat_template is not None and "{" not in c.tokenizer_chat_template:
        yield (
            f"--tokenizer_chat_template {c.tokenizer_chat_template!r} is no Jinja template: give its text, "
            'in bash "$(cat FILE)".'
        )
    if c.max_tokens_per_gpu * c.ring_attn_size < c.max_len:
        yield (
            f"--max_tokens_per_gpu {c.max_tokens_per_gpu} x --ring_attn_size {c.ring_attn_size} is less than --max_len "
            f"{c.max_len}: raise one of the first two or lower the third."
        )
    if c.lr_scheduler.follows_a_loss and c.eval_dataset is None:
        yield (
            f"--lr_scheduler {c.lr_scheduler} follows the held-out loss: add --eval_dataset (and --eval_steps), or choose a "
            "schedule that needs no measurement."
        )
    if c.eval_at_start and c.eval_dataset is None:
        yield "--eval_at_start needs --eval_dataset: add it or leave the first out."


def _sft(c: SFTConfig) -> Iterator[str]:
    if c.multiturn and not c.apply_chat_template:
        yield "--multiturn needs --apply_chat_template: add it or leave the first out."
    if c.multiturn and c.output_key is not None:
        yield (
            "--multiturn takes the whole conversation from --input_key, but --output_key is set too: "
            "leave one of them out."
        )
    if c.train_split is not None and c.changed("dataset_split"):
        yield "--train_split and --dataset_split name the same thing: leave one of them out."


def _pretrain_mode(c: SFTConfig | KDConfig, *, template_given: bool) -> Iterator[str]:
    if c.pretrain_mode:
        if c.apply_chat_template:
            yield "--pretrain_mode trains on plain text but --apply_chat_template is set: leave one of them out."
        if template_given and c.input_template is not None:
            yield "--pretrain_mode trains on plain text but --input_template is set: leave one of them out."
        if isinstance(c, SFTConfig) and c.output_key is not None:
            yield "--pretrain_mode reads --input_key only, but --output_key is set too: leave one of them out."
    elif not c.apply_chat_template and c.output_key is None:
        yield (
            "--output_key is required without --apply_chat_template: name the field with the response, or use "
            "--pretrain_mode for plain text."
        )


def _rm(c: RMConfig) -> Iterator[str]:
    if c.margin_loss and c.loss is not RewardLoss.SIGMOID:
        yield f"--margin_loss has no meaning with --loss {c.loss}: use --loss sigmoid or leave the first out."
    if not c.value_head_prefix.isidentifier():
        yield f"--value_head_prefix {c.value_head_prefix!r} must be a plain name such as score."


def _dpo(c: DPOConfig) -> Iterator[str]:
    if c.ipo and c.label_smoothing > 0:
        yield "--label_smoothing belongs to DPO's loss but --ipo replaces it: leave one of them out."
    if c.precompute_ref and c.ref_offload:
        yield "--precompute_ref frees the reference before training, so --ref_offload moves nothing: leave one of them out."


def _kto(c: KTOConfig) -> Iterator[str]:
    if c.train_batch_size < 2:
        yield (
            "--train_batch_size 1 gives --beta's KL estimate no mismatched pairs: KTO needs two rows or more, "
            "set --train_batch_size to 2 or more."
        )
    if c.precompute_ref:
        yield (
            "--precompute_ref cannot free the reference in togi kto, whose KL estimate scores other pairs of prompt and answer "
            "in every step: use --ref_offload, or leave it out."
        )
    if c.desirable_loss_weight == 0 and c.undesirable_loss_weight == 0:
        yield "--desirable_loss_weight and --undesirable_loss_weight are both 0: raise one of them."
    if c.output_key is None and not c.apply_chat_template:
        yield "--output_key is required without --apply_chat_template: name the field with the response."


def _kd(c: KDConfig) -> Iterator[str]:
    if c.on_policy_share == 0:
        for name in c.changed(*OnPolicySettings.model_fields):
            yield f"--{name} is about generated responses: add --on_policy_share, or leave --{name} out."
        return
    if c.pretrain_mode:
        yield "--pretrain_mode has no prompts, but --on_policy_share lets the student answer them: leave one of them out."
    if c.enforce_eager and c.rollout_engine is EngineName.TRANSFORMERS:
        yield "--enforce_eager needs --rollout_engine vllm: change one of them."


def _prm(c: PRMConfig) -> Iterator[str]:
    if c.reward_tokens is not None and len(set(c.reward_tokens)) < 2:
        yield f"--reward_tokens {' '.join(c.reward_tokens)} must be two different tokens or more, or left out."
    if c.reward_tokens is not None and c.placeholder_token in c.reward_tokens:
        yield "--placeholder_token is one of --reward_tokens: a step marker cannot be a label, change one of them."


def _output(c: OfflineConfig) -> Iterator[str]:
    yield from output_problems(c, evaluates=c.eval_dataset is not None)
    if c.eval_steps == 0:
        yield "--eval_steps must be positive, or -1."
