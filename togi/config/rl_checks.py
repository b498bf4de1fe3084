"""Contradictions between the settings of ``togi rl``, found before anything heavy starts.

Each message names both flags and the remedy.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

from togi.config import choices, shared
from togi.config.fields import Hook, refuse
from togi.config.rl import PretrainMixSettings, RLConfig
from togi.errors import ConfigError


def check_rl(config: RLConfig, *, reward_given: bool = False) -> None:
    """Raise ConfigError with the first contradiction in the settings of ``togi rl``.

    ``reward_given``: the reward is a Python function passed in code, not a flag.
    """
    has_reward = reward_given or config.reward_files or config.reward_urls or config.reward_models
    if reward_given and config.reward_files:
        raise ConfigError("A reward function was passed and --reward_func is set too: leave one of them out.")
    # In this order: what is missing is reported before what does not fit together.
    parts = (_required, _data, _reward, _rollout, sample_problems, _algorithm, _training, _placement, _output, _replay)
    refuse(message for part in parts for message in part(config))
    if not has_reward and config.generates:
        raise ConfigError(
            "There is no reward: give --reward_func FILE.py, --reward_pretrain MODEL, --remote_rm_url URL, or several."
        )
    refuse(weight_problems(config, reward_given=reward_given))


def _required(c: RLConfig) -> Iterator[str]:
    if not c.pretrain:
        yield "--pretrain is required: the Hugging Face folder or hub name of the model to train."
    if not c.prompt_data:
        yield "--prompt_data is required: a JSON, JSONL, CSV, Parquet or Arrow file, a saved data set folder or a hub name."


def _data(c: RLConfig) -> Iterator[str]:
    yield from shared.rendering_problems(c)
    if c.max_len is not None and c.max_len < c.prompt_max_len + c.generate_max_len:
        yield (
            f"--max_len {c.max_len} is less than --prompt_max_len {c.prompt_max_len} + --generate_max_len "
            f"{c.generate_max_len}: raise the first or lower one of the others."
        )


def _verifier_settings(c: RLConfig) -> Iterator[str]:
    """Flags that belong to one built-in reward function."""
    if (c.format_regex is not None) != (f"{choices.BUILTIN}{choices.Verifier.FORMAT}" in c.reward_files):
        yield "--format_regex and --reward_func builtin:format belong together: give both or none."
    yield from _regex_problems(c.format_regex or "")
    uses_length = f"{choices.BUILTIN}{choices.Verifier.LENGTH}" in c.reward_files
    if (c.length_target is not None) != uses_length:
        yield "--length_target and --reward_func builtin:length belong together: give both or none."
    if c.length_shape is not choices.LengthShape.LINEAR and not uses_length:
        yield "--length_shape belongs to --reward_func builtin:length: add that, or leave the shape out."


def _reward(c: RLConfig) -> Iterator[str]:
    known = {f"{choices.BUILTIN}{verifier}" for verifier in choices.Verifier}
    # Each source by itself, then their flags.
    for file in c.reward_files:
        if file.startswith(choices.BUILTIN) and file not in known:
            yield f"--reward_func {file} is not known: the built-in ones are {', '.join(sorted(known))}."
        if not file.startswith(choices.BUILTIN) and not file.endswith(".py"):
            yield f"--reward_func {file} must be a Python file that defines reward_func(queries, prompts, labels)."
    for url in c.reward_urls:
        if not url.startswith(("http://", "https://")):
            yield f"--remote_rm_url {url}: give the http:// or https:// address of a reward server, or the path of a .py file."
    yield from _verifier_settings(c)
    for flag, items in (
        ("--reward_func", c.reward_files),
        ("--remote_rm_url", c.reward_urls),
        ("--reward_pretrain", c.reward_models),
    ):
        twice = [item for item in items if items.count(item) > 1]
        if twice:
            yield f"{flag} names {twice[0]} twice: leave one of them out, or give it --reward_weights."
    # How several sources are used.
    if c.remote_rm_mode is choices.RemoteMode.ENSEMBLE and len(c.reward_urls) < 2:
        yield "--remote_rm_mode ensemble needs several addresses in --remote_rm_url: add one or leave the mode out."
    if c.normalize_reward and not c.reward_models:
        yield "--normalize_reward works on a reward model: add --reward_pretrain or leave it out."
    low, high = c.reward_clip_range
    if not low < high:
        yield f"--reward_clip_range {low} {high}: the first number must be below the second."


def _regex_problems(pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"--format_regex {pattern} is not a regular expression: {error}."


def weight_problems(c: RLConfig, *, reward_given: bool) -> Iterator[str]:
    """Faults in how several rewards are combined."""
    count = len(c.reward_models) + c.remote_sources + len(c.reward_files) + reward_given
    if count < 2 and c.reward_combine is not choices.RewardCombination.SUM:
        yield f"--reward_combine {c.reward_combine} needs several rewards: leave it out."
    if c.reward_weights is None:
        return
    if len(c.reward_weights) != count:
        yield (
            f"--reward_weights has {len(c.reward_weights)} numbers for {count} rewards ({len(c.reward_models)} models, "
            f"{c.remote_sources} servers, {len(c.reward_files) + reward_given} functions): give one for each, in this order."
        )
    if not all(math.isfinite(weight) and weight != 0 for weight in c.reward_weights):
        yield "--reward_weights must be finite and not 0: leave out a reward that does not count."
    if c.reward_combine is choices.RewardCombination.MEAN and not sum(c.reward_weights) > 0:
        yield "--reward_weights must have a sum above 0 with --reward_combine mean: change them, or use sum."


def _rollout(c: RLConfig) -> Iterator[str]:
    if c.top_p != 1.0:
        yield (
            f"--top_p {c.top_p} cannot be trained on: log-probabilities of a cut distribution differ from the model's; "
            "use --top_p 1."
        )
    if c.rollout_engine is choices.EngineName.TRANSFORMERS:
        if c.enforce_eager:
            yield "--enforce_eager needs --rollout_engine vllm: change one of them."
        if c.vllm_tensor_parallel_size > 1:
            yield f"--vllm_tensor_parallel_size {c.vllm_tensor_parallel_size} needs --rollout_engine vllm: change one of them."


def _algorithm(c: RLConfig) -> Iterator[str]:
    estimator = c.advantage_estimator
    if estimator.uses_groups and c.n_samples_per_prompt < 2:
        yield (
            f"--advantage_estimator {estimator} compares the responses to one prompt: set --n_samples_per_prompt to 2 or more."
        )
    if estimator.uses_groups and c.gamma != 1.0:
        yield f"--gamma {c.gamma} has no meaning with --advantage_estimator {estimator}: use --gamma 1."
    if not c.uses_critic:
        if c.critic_pretrain is not None:
            yield f"--critic_pretrain needs a critic but --advantage_estimator {estimator} has none: use gae or leave it out."
        if c.save_value_network:
            yield f"--save_value_network needs a critic but --advantage_estimator {estimator} has none: use gae or leave it out."
    # The KL penalty: with a reference, with a controller that can settle, with an estimator that fits its place.
    if c.use_kl_loss and not c.uses_reference:
        yield "--use_kl_loss with --init_kl_coef 0 has no effect: raise the coefficient or leave --use_kl_loss out."
    if c.kl_target is not None and not c.uses_reference:
        yield "--kl_target needs a reference model but --init_kl_coef is 0: raise it or leave --kl_target out."
    if c.kl_target is not None and c.samples_per_rollout >= 5 * c.kl_horizon:
        yield (
            f"--kl_horizon {c.kl_horizon} is too short for --kl_target with {c.samples_per_rollout} samples a rollout: "
            f"set it above {c.samples_per_rollout // 5}."
        )
    if c.uses_reference and c.use_kl_loss and c.kl_estimator is choices.KLEstimator.K1:
        yield (
            "--kl_estimator k1 has zero expected gradient as a loss: with --use_kl_loss choose --kl_estimator k2 or k3, "
            "or leave --use_kl_loss out."
        )
    if c.uses_reference and not c.use_kl_loss and c.kl_estimator is not choices.KLEstimator.K1:
        yield f"--kl_estimator {c.kl_estimator} belongs in the loss: add --use_kl_loss, or use --kl_estimator k1."
    yield from policy_loss_problems(c)
    yield from lora_sync_problems(c)
    yield from shared.lora_dropout_problems(c)
    yield from _useless(c)


def _useless(c: RLConfig) -> Iterator[str]:
    """Settings of advantages that the estimator ignores."""
    estimator = c.advantage_estimator
    if isinstance(estimator, Hook):
        for name in c.changed("gamma", "lambd", "reward_clip_range", "no_advantage_std_norm"):
            yield f"--{name} has no effect with --advantage_estimator {estimator}, whose result is used as it is: leave it out."
    if c.no_advantage_std_norm and estimator in (
        choices.AdvantageEstimator.GROUP_NORM,
        choices.AdvantageEstimator.DR_GRPO,
    ):
        yield f"--no_advantage_std_norm has no effect with --advantage_estimator {estimator}: leave it out."


def _training(c: RLConfig) -> Iterator[str]:
    yield from shared.train_problems(c, c)
    if c.train_batch_size > c.samples_per_rollout:
        yield (
            f"--train_batch_size {c.train_batch_size} is more than the {c.samples_per_rollout} samples of one rollout "
            f"(--rollout_batch_size {c.rollout_batch_size} x --n_samples_per_prompt {c.n_samples_per_prompt}): lower it."
        )
    if c.lr_scheduler.follows_a_loss:
        yield (
            f"--lr_scheduler {c.lr_scheduler} follows a held-out loss, and togi rl measures rewards: use it with the commands "
            "on fixed data, here constant_with_warmup or cosine_with_min_lr."
        )
    yield from shared.model_problems(c)
    yield from shared.parallel_problems(c, c)
    # The longest sequence must fit one micro-batch of a ring.
    if c.max_tokens_per_gpu * c.ring_attn_size < c.prompt_max_len + c.generate_max_len:
        ring = f" x --ring_attn_size {c.ring_attn_size}" if c.ring_attn_size > 1 else ""
        yield (
            f"--max_tokens_per_gpu {c.max_tokens_per_gpu}{ring} is less than the longest sequence (--prompt_max_len "
            f"{c.prompt_max_len} + --generate_max_len {c.generate_max_len}): raise it or lower one of the others."
        )
    if c.eval_at_start and c.eval_dataset is None:
        yield "--eval_at_start needs --eval_dataset: add it or leave the first out."
    if c.eval_steps > 0 and c.eval_dataset is None:
        yield f"--eval_steps {c.eval_steps} needs --eval_dataset: add it or leave the first out."


def _placement(c: RLConfig) -> Iterator[str]:
    values, everything = dict(c), c.colocate_all_models

    def unequal(switch: str, a: str, b: str) -> Iterator[str]:
        nodes_a, nodes_b = values[f"{a}_num_nodes"], values[f"{b}_num_nodes"]
        gpus_a, gpus_b = values[f"{a}_num_gpus_per_node"], values[f"{b}_num_gpus_per_node"]
        if nodes_a != nodes_b or ("auto" not in (gpus_a, gpus_b) and gpus_a != gpus_b):
            yield (
                f"--{switch} puts {a} and {b} on the same GPUs, but --{a}_num_nodes x --{a}_num_gpus_per_node is "
                f"{nodes_a} x {gpus_a} and --{b}_num_nodes x --{b}_num_gpus_per_node is {nodes_b} x {gpus_b}: make them equal."
            )

    if everything and c.colocate_critic_reward:
        yield "--colocate_all_models already includes --colocate_critic_reward: leave the second out."
    if (c.colocate_actor_ref or everything) and c.loads_reference:
        yield from unequal("colocate_all_models" if everything else "colocate_actor_ref", "actor", "ref")
    if c.colocate_critic_reward and c.uses_critic and c.reward_models:
        yield from unequal("colocate_critic_reward", "critic", "reward")
    if everything and c.uses_critic:
        yield from unequal("colocate_all_models", "actor", "critic")
    if everything and c.reward_models:
        yield from unequal("colocate_all_models", "actor", "reward")


def _output(c: RLConfig) -> Iterator[str]:
    yield from shared.output_problems(c, evaluates=c.eval_dataset is not None)
    yield from shared.head_problems(c.value_head_prefix)
    if c.eval_steps == 0:
        yield "--eval_steps must be positive, or -1."
    if c.max_steps == 0:
        yield "--max_steps 0 would train nothing: give a positive number, or -1 for all episodes."


def _replay(c: RLConfig) -> Iterator[str]:
    if c.replay is None:
        return
    if c.eval_dataset is not None:
        yield "--replay starts no engine, so that nothing can be evaluated: leave --eval_dataset out."
    if c.run_dir is not None and os.path.realpath(c.run_dir) == os.path.realpath(c.replay):
        yield f"--replay and --run_dir are both {c.run_dir}: give the new run a folder of its own."


def policy_loss_problems(c: RLConfig) -> Iterator[str]:
    """Faults of clip range, aggregation and correction, given the kind of loss."""
    kind, (low, high) = c.policy_loss_type, c.clip_range
    flag = "--eps_clip" if c.eps_clip_low_high is None else "--eps_clip_low_high"
    is_cispo = kind is choices.PolicyLossType.CISPO
    if low <= 0 or high <= 0 or low > 1 or (low == 1 and not is_cispo):
        limit = "at most 1, which is no lower bound" if is_cispo else "below 1"
        yield f"{flag}: the clip range {low:g} {high:g} must be positive and the lower number {limit}."
    if c.dual_clip is not None and is_cispo:
        yield "--dual_clip bounds a ratio that --policy_loss_type cispo bounds already, on both sides: leave it out."
    if c.dual_clip is not None and isinstance(kind, Hook):
        yield f"--dual_clip has no effect with --policy_loss_type {kind}: leave it out."
    if kind is choices.PolicyLossType.GSPO and c.aggregation is not choices.Aggregation.SEQUENCE_MEAN:
        yield (
            f"--policy_loss_type gspo is a mean over sequences of their token means, not --loss_aggregation {c.aggregation}: "
            "leave the second out."
        )
    yield from _correction_problems(c)


def lora_sync_problems(c: RLConfig) -> Iterator[str]:
    """Faults of ``--lora_sync``."""
    if c.lora_sync is choices.LoraSync.AUTO:
        return
    if c.lora_rank == 0:
        yield f"--lora_sync {c.lora_sync} is about an adapter: add --lora_rank, or leave it out."
    elif c.load_in_4bit and c.lora_sync is choices.LoraSync.ADAPTERS:
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
    if changed and c.policy_loss_type is choices.PolicyLossType.GSPO:
        yield (
            f"{changed[0]} is about weights of tokens, but --policy_loss_type gspo with --enable_vllm_is_correction takes its "
            "ratio against the engine's log-probs and has none: leave it out."
        )


def sample_problems(c: RLConfig) -> Iterator[str]:
    """Faults of filtering, length penalties, freezing and averaging."""
    if c.freezing_actor_steps > 0 and not c.uses_critic:
        yield (
            f"--freezing_actor_steps {c.freezing_actor_steps} is a warm-up of the critic but --advantage_estimator "
            f"{c.advantage_estimator} has none: use gae, or leave it out."
        )
    low, high = c.dynamic_filtering_reward_range
    if not low < high:
        yield f"--dynamic_filtering_reward_range {low:g} {high:g}: the first number must be below the second."
    if c.dynamic_filtering and c.n_samples_per_prompt < 2:
        yield "--dynamic_filtering judges the responses to one prompt together: set --n_samples_per_prompt to 2 or more."
    # Flags of a feature that is off.
    if not c.dynamic_filtering:
        yield from _without(
            c, "--dynamic_filtering", "dynamic_filtering_reward_range", "dynamic_filtering_max_generations"
        )
    if not c.enable_ema:
        yield from _without(c, "--enable_ema", "ema_beta")
    yield from _pretrain_problems(c)
    if c.overlong_buffer_len is None:
        yield from _without(c, "--overlong_buffer_len", "overlong_penalty_factor")
    elif c.overlong_buffer_len > c.generate_max_len:
        yield (
            f"--overlong_buffer_len {c.overlong_buffer_len} is more than --generate_max_len {c.generate_max_len}, of which it is "
            "the last part: lower it."
        )


def _pretrain_problems(c: RLConfig) -> Iterator[str]:
    if c.pretrain_data is None:
        yield from _without(
            c, "--pretrain_data", *(n for n in PretrainMixSettings.model_fields if n != "pretrain_data")
        )
    if c.pretrain_max_len is not None and c.pretrain_max_len > c.max_tokens_per_gpu:
        yield (
            f"--pretrain_max_len {c.pretrain_max_len} is more than --max_tokens_per_gpu {c.max_tokens_per_gpu}: raise the second "
            "or lower the first."
        )


def _without(c: RLConfig, needed: str, *names: str) -> Iterator[str]:
    """The first of ``names`` that was changed although the setting that reads it, ``needed``, is not set."""
    for name in c.changed(*names):
        yield f"--{name} has no effect without {needed}: add it, or leave the first out."
