"""Contradictions between the settings of ``togi rl``, found before anything heavy starts.

Each message names both flags and the remedy. {name} in a message stands for a flag with its value (``fields.refuse``).
"""

import math
import os
import re
from collections.abc import Iterator

from togi.config import choices, shared
from togi.config.fields import Hook, missing, refuse, unread
from togi.config.rl import PretrainMixSettings, RewardSettings, RLConfig

# The settings that only another one reads, by that one.
READERS = {
    "max_staleness": ("on_stale", "max_token_lag", "recompute_kv"),
    "dynamic_filtering": ("dynamic_filtering_reward_range", "dynamic_filtering_max_generations"),
    "enable_ema": ("ema_beta",),
    "enable_vllm_is_correction": ("vllm_is_correction_type", "vllm_is_truncated_threshold"),
    "eval_dataset": ("eval_at_start", "eval_steps"),
    "lora_rank": ("lora_sync",),
    "overlong_buffer_len": ("overlong_penalty_factor",),
    "pretrain_data": tuple(name for name in PretrainMixSettings.model_fields if name != "pretrain_data"),
}

ENGINE_FLAGS = (
    *shared.VLLMSettings.model_fields,
    *(
        "vllm_num_engines",
        "vllm_tensor_parallel_size",
        "vllm_gpu_memory_utilization",
        "vllm_sync_backend",
        "vllm_sync_with_ray",
    ),
    *("vllm_enable_sleep", "max_num_seqs", "enable_prefix_caching", "weight_sync_timeout"),
)


def check_rl(config: RLConfig, *, reward_given: bool = False) -> None:
    """Raise ConfigError with the first contradiction in the settings of ``togi rl``.

    ``reward_given``: the reward is a Python function passed in code, not a flag.
    """
    refuse(config, _problems(config, reward_given=reward_given))


def _problems(c: RLConfig, *, reward_given: bool) -> Iterator[str]:
    if reward_given and c.reward_files:
        yield "A reward function was passed and --reward_func is set too: leave one of them out."
    # In this order: what is missing is reported before what does not fit together.
    yield from missing(c, pretrain=shared.MODEL_TO_TRAIN, prompt_data=shared.ROWS)
    yield from shared.rendering_problems(c)
    if c.max_len is not None and c.max_len < c.prompt_max_len + c.generate_max_len:
        yield "{max_len} is less than {prompt_max_len} + {generate_max_len}: raise the first or lower one of the others."
    for part in (_reward, _rollout, _acting, _samples, _algorithm, _policy_loss, _training, _placement, _output):
        yield from part(c)
    yield from combination_problems(c, reward_given=reward_given)


def _reward(c: RLConfig) -> Iterator[str]:
    yield from reward_problems(c)
    if c.normalize_reward and not c.reward_models:
        yield "--normalize_reward works on a reward model: add --reward_pretrain or leave it out."
    if not c.reward_clip_range[0] < c.reward_clip_range[1]:
        yield "{reward_clip_range}: the first number must be below the second."


def reward_problems(c: RewardSettings) -> Iterator[str]:
    """Faults of the sources of the reward, each by itself."""
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
    sources = {"--reward_func": c.reward_files, "--remote_rm_url": c.reward_urls, "--reward_pretrain": c.reward_models}
    for flag, items in sources.items():
        for item in items:
            if items.count(item) > 1:
                yield f"{flag} names {item} twice: leave one of them out, or give it --reward_weights."
    if c.remote_rm_mode is choices.RemoteMode.ENSEMBLE and len(c.reward_urls) < 2:
        yield "{remote_rm_mode} needs several addresses in --remote_rm_url: add one or leave the mode out."


def _verifier_settings(c: RewardSettings) -> Iterator[str]:
    """Flags that belong to one built-in reward function."""
    if (c.format_regex is not None) != (f"{choices.BUILTIN}{choices.Verifier.FORMAT}" in c.reward_files):
        yield "--format_regex and --reward_func builtin:format belong together: give both or none."
    try:
        re.compile(c.format_regex or "")
    except re.error as error:
        yield f"{{format_regex}} is not a regular expression: {error}."
    uses_length = f"{choices.BUILTIN}{choices.Verifier.LENGTH}" in c.reward_files
    if (c.length_target is not None) != uses_length:
        yield "--length_target and --reward_func builtin:length belong together: give both or none."
    if c.length_shape is not choices.LengthShape.LINEAR and not uses_length:
        yield "--length_shape belongs to --reward_func builtin:length: add that, or leave the shape out."


def combination_problems(c: RewardSettings, *, reward_given: bool = False) -> Iterator[str]:
    """No reward at all, and faults in how several are combined."""
    if c.generates and not (c.acts or reward_given or c.reward_files or c.reward_urls or c.reward_models):
        yield "There is no reward: give --reward_func FILE.py, --reward_pretrain MODEL, --remote_rm_url URL, or several."
    models, functions = len(c.reward_models), len(c.reward_files) + reward_given
    count, is_mean = models + c.remote_sources + functions + c.acts, c.reward_combine is choices.RewardCombination.MEAN
    if count < 2 and is_mean:
        yield "{reward_combine} needs several rewards: leave it out."
    if c.reward_weights is None:
        return
    if len(c.reward_weights) != count:
        yield (
            f"--reward_weights has {len(c.reward_weights)} numbers for {count} rewards ({models} models, "
            f"{c.remote_sources} servers, {functions} functions{', 1 environment' * c.acts}): give one for each, in this order."
        )
    if not all(math.isfinite(weight) and weight != 0 for weight in c.reward_weights):
        yield "--reward_weights must be finite and not 0: leave out a reward that does not count."
    if is_mean and not sum(c.reward_weights) > 0:
        yield "--reward_weights must have a sum above 0 with --reward_combine mean: change them, or use sum."


def _rollout(c: RLConfig) -> Iterator[str]:
    if c.top_p != 1.0:
        yield "{top_p} cannot be trained on: log-probs of a cut distribution differ from the model's; use --top_p 1."
    of_vllm = ("vllm_tensor_parallel_size", "vllm_gpu_memory_utilization", "enable_prefix_caching")
    yield from c.engine_problems(c.rollout_engine, "rollout_engine", *of_vllm)
    yield from _staleness(c)
    # engine and trainer then differ by more than rounding in bf16, which pushes the policy away unseen
    if not (c.enable_vllm_is_correction or c.allow_uncorrected_rollouts):
        for name in c.rounding:
            yield (
                f"{{{name}}} samples from a rounded model: add --enable_vllm_is_correction, or --allow_uncorrected_rollouts to "
                "train on it as it is."
            )
    needs_correction = bool(c.rounding) or c.max_staleness > 0
    if c.allow_uncorrected_rollouts and (c.enable_vllm_is_correction or not needs_correction):
        yield "--allow_uncorrected_rollouts has no effect here: leave it out."


def _acting(c: RLConfig) -> Iterator[str]:
    """What environments and agents need, and what does not go with them."""
    if not c.acts:
        for name in c.changed(
            "max_turns", "max_tool_seconds", "max_observation_chars", "episode_processes", "agent_timeout"
        ):
            yield f"--{name} is about episodes: add --environment or --agent, or leave it out."
        if c.turn_discount != 1.0:
            yield "{turn_discount} needs several turns: add --environment or --agent, or leave it out."
        return
    if c.environment is not None and c.agent is not None:
        yield "--environment and --agent both begin episodes: leave one of them out."
    if not c.apply_chat_template:
        yield "--environment and --agent speak through the chat template: add --apply_chat_template."
    for name in c.changed("input_template", "overlong_buffer_len", "stop_properly_penalty_coef"):
        yield f"--{name} is about single answers, not episodes: leave it out."


def _staleness(c: RLConfig) -> Iterator[str]:
    """What asynchronous RL needs, and what does not go with it."""
    if c.max_staleness == 0:
        return
    if c.token_lag < c.max_staleness:
        yield "{max_token_lag} is less than {max_staleness}, the age that every rollout may have: raise the first."
    if not (c.enable_vllm_is_correction or c.allow_uncorrected_rollouts):
        yield (
            "{max_staleness} trains on tokens of older weights: leave --enable_vllm_is_correction on, or add "
            "--allow_uncorrected_rollouts to train on them as they are."
        )
    if c.full_determinism and c.replay is None:
        yield "{max_staleness} lets timing decide which weights sample a token, which --full_determinism rules out: leave one out."
    # who generates while the models train needs memory of its own
    for name in c.changed("colocate_all_models", "vllm_enable_sleep", "trainer_enable_sleep", "deepspeed_enable_sleep"):
        yield f"--{name} lets engines and models take turns, but with {{max_staleness}} they work at once: leave one out."
    if c.workers is choices.WorkersKind.LOCAL and c.replay is None:
        yield "{workers} keeps engine and models in one process, but with {max_staleness} they work at once: leave one out."


def _samples(c: RLConfig) -> Iterator[str]:
    """Faults of filtering, length penalties, freezing and averaging."""
    if c.freezing_actor_steps > 0 and not c.uses_critic:
        yield "{freezing_actor_steps} is a warm-up of the critic but {advantage_estimator} has none: use gae, or leave it out."
    if not c.dynamic_filtering_reward_range[0] < c.dynamic_filtering_reward_range[1]:
        yield "{dynamic_filtering_reward_range}: the first number must be below the second."
    if c.dynamic_filtering and c.n_samples_per_prompt < 2:
        yield "--dynamic_filtering judges the responses to one prompt together: set --n_samples_per_prompt to 2 or more."
    if c.overlong_buffer_len is not None and c.overlong_buffer_len > c.generate_max_len:
        yield "{overlong_buffer_len} is more than {generate_max_len}, of which it is the last part: lower it."
    yield from unread(c, READERS)
    if c.pretrain_max_len is not None and c.pretrain_max_len > c.max_tokens_per_gpu:
        yield "{pretrain_max_len} is more than {max_tokens_per_gpu}: raise the second or lower the first."


def _algorithm(c: RLConfig) -> Iterator[str]:
    estimator = c.advantage_estimator
    if estimator.uses_groups and c.n_samples_per_prompt < 2:
        yield "{advantage_estimator} compares the responses to one prompt: set --n_samples_per_prompt to 2 or more."
    if estimator.uses_groups and c.gamma != 1.0:
        yield "{gamma} has no meaning with {advantage_estimator}: use --gamma 1."
    if not c.uses_critic:
        for name in c.changed("critic_pretrain", "save_value_network"):
            yield f"--{name} needs a critic but {{advantage_estimator}} has none: use gae or leave it out."
    # Settings of advantages that the estimator ignores.
    if isinstance(estimator, Hook):
        for name in c.changed("gamma", "lambd", "reward_clip_range", "no_advantage_std_norm"):
            yield f"--{name} has no effect with {{advantage_estimator}}, whose result is used as it is: leave it out."
    if c.no_advantage_std_norm and estimator in ("group_norm", "dr_grpo"):
        yield "--no_advantage_std_norm has no effect with {advantage_estimator}: leave it out."
    yield from _kl(c)
    yield from shared.lora_dropout_problems(c)
    if c.load_in_4bit and c.lora_sync is choices.LoraSync.ADAPTERS:
        yield "--lora_sync adapters with --load_in_4bit would be merged into weights that were never rounded: leave it out."


def _kl(c: RLConfig) -> Iterator[str]:
    """The KL penalty: with a reference, with a controller that can settle, with an estimator that fits its place."""
    if not c.uses_reference:
        for name in c.changed("use_kl_loss", "kl_target"):
            yield f"--{name} needs a reference model but --init_kl_coef is 0: raise it or leave --{name} out."
    if c.kl_target is not None and c.samples_per_rollout >= 5 * c.kl_horizon:
        least = c.samples_per_rollout // 5
        yield f"{{kl_horizon}} is too short for --kl_target: set it above {least}, a fifth of the samples of a rollout."
    if c.uses_reference and c.use_kl_loss and c.kl_estimator is choices.KLEstimator.K1:
        yield "{kl_estimator} has zero expected gradient in the loss: choose k2 or k3, or leave --use_kl_loss out."
    if c.uses_reference and not c.use_kl_loss and c.kl_estimator is not choices.KLEstimator.K1:
        yield "{kl_estimator} belongs in the loss: add --use_kl_loss, or use --kl_estimator k1."


def _policy_loss(c: RLConfig) -> Iterator[str]:
    """Faults of clip range, aggregation and correction, given the kind of loss."""
    kind, (low, high) = c.policy_loss_type, c.clip_range
    is_cispo = kind is choices.PolicyLossType.CISPO
    if low <= 0 or high <= 0 or low > 1 or (low == 1 and not is_cispo):
        flag = "--eps_clip" if c.eps_clip_low_high is None else "--eps_clip_low_high"
        limit = "at most 1, which is no lower bound" if is_cispo else "below 1"
        yield f"{flag}: the clip range {low:g} {high:g} must be positive and the lower number {limit}."
    if c.dual_clip is not None and is_cispo:
        yield "--dual_clip bounds a ratio that --policy_loss_type cispo bounds already, on both sides: leave it out."
    if c.dual_clip is not None and isinstance(kind, Hook):
        yield "--dual_clip has no effect with {policy_loss_type}: leave it out."
    is_gspo = kind is choices.PolicyLossType.GSPO
    if is_gspo and c.aggregation is not choices.Aggregation.SEQUENCE_MEAN:
        yield "{policy_loss_type} is a mean over sequences of their token means, not {loss_aggregation}: leave the second out."
    low, high = c.vllm_is_truncated_threshold
    if not 0 <= low < high:
        yield "{vllm_is_truncated_threshold}: the first number must be at least 0 and below the second."
    if c.vllm_is_correction_type is choices.CorrectionType.RATIO:
        for name in c.changed("vllm_is_truncated_threshold"):
            yield f"{{{name}}} is a range of weights, but {{vllm_is_correction_type}} has none, only its clip: leave it out."
    for name in c.changed(*READERS["enable_vllm_is_correction"]) if is_gspo else ():
        yield f"{{{name}}} is about weights of tokens, which {{policy_loss_type}} does not have: leave it out."


def _training(c: RLConfig) -> Iterator[str]:
    yield from shared.train_problems(c, c)
    if c.train_batch_size > c.samples_per_rollout:
        samples = f"{c.samples_per_rollout} samples of {{rollout_batch_size}} x {{n_samples_per_prompt}}"
        yield f"{{train_batch_size}} is more than the {samples}: lower it."
    if c.lr_scheduler.follows_a_loss:
        yield "{lr_scheduler} follows a held-out loss, but togi rl measures rewards: choose another, such as constant_with_warmup."
    yield from shared.model_problems(c)
    yield from shared.parallel_problems(c, c)
    # The longest sequence must fit one micro-batch of a ring.
    ring = " x {ring_attn_size}" if c.ring_attn_size > 1 else ""
    if c.max_tokens_per_gpu * c.ring_attn_size < c.prompt_max_len + c.generate_max_len:
        yield f"{{max_tokens_per_gpu}}{ring} is less than {{prompt_max_len}} + {{generate_max_len}}: raise it or lower those."
    elif c.acts and c.max_tokens_per_gpu * c.ring_attn_size < c.context_length:
        yield f"{{max_tokens_per_gpu}}{ring} is less than {{max_len}}, which an episode may have: raise the first."


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
    of_actor = "colocate_all_models" if everything else "colocate_actor_ref"
    if (c.colocate_actor_ref or everything) and c.loads_reference:
        yield from unequal(of_actor, "actor", "ref")
    if c.colocate_critic_reward and c.uses_critic and c.reward_models:
        yield from unequal("colocate_critic_reward", "critic", "reward")
    for other, is_there in (("critic", c.uses_critic), ("reward", c.reward_models)):
        if everything and is_there:
            yield from unequal(of_actor, "actor", other)


def _output(c: RLConfig) -> Iterator[str]:
    yield from shared.output_problems(c, evaluates=c.eval_dataset is not None)
    yield from shared.head_problems(c.value_head_prefix)
    if c.eval_steps == 0:
        yield "--eval_steps must be positive, or -1."
    if c.max_steps == 0:
        yield "--max_steps 0 would train nothing: give a positive number, or -1 for all episodes."
    if c.replay is None:
        return
    if c.eval_dataset is not None:
        yield "--replay starts no engine, so that nothing can be evaluated: leave --eval_dataset out."
    for name in c.changed(*ENGINE_FLAGS):
        yield f"{{{name}}} is about engines, but --replay starts none: leave it out."
    if c.run_dir is not None and os.path.realpath(c.run_dir) == os.path.realpath(c.replay):
        yield f"--replay and --run_dir are both {c.run_dir}: give the new run a folder of its own."
