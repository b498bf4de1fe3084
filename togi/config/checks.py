"""Contradictions between settings, found before anything heavy starts. Each message names both flags and the remedy."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator

from togi.config.choices import (
    BUILTIN,
    AdvantageEstimator,
    BackendName,
    EngineName,
    GradAccumDtype,
    KLEstimator,
    LengthShape,
    RemoteMode,
    RewardCombination,
    Scheduler,
    Verifier,
)
from togi.config.hooks import Hook
from togi.config.parallel_checks import parallel_problems
from togi.config.policy_checks import lora_dropout_problems, lora_sync_problems, policy_loss_problems
from togi.config.rl import RLConfig
from togi.config.sample_checks import sample_problems
from togi.config.shared import ALL_LINEAR, MIXTURES, NO_METRIC, ModelSettings, OutputSettings, TrainSettings
from togi.errors import ConfigError

Check = Callable[[RLConfig], Iterator[str]]


def check_rl(config: RLConfig, *, reward_given: bool = False) -> None:
    """Raise ConfigError with the first contradiction in the settings of ``togi rl``.

    ``reward_given``: the reward is a Python function passed in code, not a flag.
    """
    has_reward = reward_given or config.reward_files or config.reward_urls or config.reward_models
    if reward_given and config.reward_files:
        raise ConfigError("A reward function was passed and --reward_func is set too: leave one of them out.")
    # In this order: what is missing is reported before what does not fit together.
    checks: Iterable[Check] = (
        _required,
        _data,
        _reward,
        _rollout,
        sample_problems,
        _algorithm,
        _training,
        _placement,
        _output,
        _replay,
    )
    for check in checks:
        for message in check(config):
            raise ConfigError(message)
    if not has_reward and config.generates:
        raise ConfigError(
            "There is no reward: give --reward_func FILE.py, --reward_pretrain MODEL, --remote_rm_url URL, or several."
        )
    for message in weight_problems(config, reward_given=reward_given):
        raise ConfigError(message)


def template_problems(template: str, *, applied: bool) -> Iterator[str]:
    """Faults of an ``--input_template`` that the user wrote. ``applied``: rows are rendered with a chat template."""
    if applied:
        yield "--input_template and --apply_chat_template exclude each other: leave one of them out."
    if template.count("{}") != 1:
        yield f"--input_template must contain {{}} exactly once, where the prompt goes, but is {template!r}."
    if "\\n" in template:
        yield "--input_template contains a backslash followed by n: write a real line break, in bash $'...\\n...'."


def chat_template_problems(template: str | None, *, applied: bool) -> Iterator[str]:
    """Faults of a ``--tokenizer_chat_template``. ``applied``: rows are rendered with a chat template."""
    if template is not None and not applied:
        yield "--tokenizer_chat_template is only used with --apply_chat_template: add it, or leave the template out."
    if template is not None and "{" not in template:
        yield f'--tokenizer_chat_template {template!r} is no Jinja template: give its text, in bash "$(cat FILE)".'


def _required(c: RLConfig) -> Iterator[str]:
    if not c.pretrain:
        yield "--pretrain is required: the Hugging Face folder or hub name of the model to train."
    if not c.prompt_data:
        yield "--prompt_data is required: a JSON, JSONL, CSV, Parquet or Arrow file, a saved data set folder or a hub name."


def _data(c: RLConfig) -> Iterator[str]:
    if c.input_template is not None:
        yield from template_problems(c.input_template, applied=c.apply_chat_template)
    yield from chat_template_problems(c.tokenizer_chat_template, applied=c.apply_chat_template)
    if c.max_len is not None and c.max_len < c.prompt_max_len + c.generate_max_len:
        yield (
            f"--max_len {c.max_len} is less than --prompt_max_len {c.prompt_max_len} + --generate_max_len "
            f"{c.generate_max_len}: raise the first or lower one of the others."
        )


def _verifier_settings(c: RLConfig) -> Iterator[str]:
    """Flags that belong to one built-in reward function."""
    if (c.format_regex is not None) != (f"{BUILTIN}{Verifier.FORMAT}" in c.reward_files):
        yield "--format_regex and --reward_func builtin:format belong together: give both or none."
    yield from _regex_problems(c.format_regex or "")
    uses_length = f"{BUILTIN}{Verifier.LENGTH}" in c.reward_files
    if (c.length_target is not None) != uses_length:
        yield "--length_target and --reward_func builtin:length belong together: give both or none."
    if c.length_shape is not LengthShape.LINEAR and not uses_length:
        yield "--length_shape belongs to --reward_func builtin:length: add that, or leave the shape out."


def _reward(c: RLConfig) -> Iterator[str]:
    known = {f"{BUILTIN}{verifier}" for verifier in Verifier}
    # Each source by itself, then their flags.
    for file in c.reward_files:
        if file.startswith(BUILTIN) and file not in known:
            yield f"--reward_func {file} is not known: the built-in ones are {', '.join(sorted(known))}."
        if not file.startswith(BUILTIN) and not file.endswith(".py"):
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
    if c.remote_rm_mode is RemoteMode.ENSEMBLE and len(c.reward_urls) < 2:
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
    if count < 2 and c.reward_combine is not RewardCombination.SUM:
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
    if c.reward_combine is RewardCombination.MEAN and not sum(c.reward_weights) > 0:
        yield "--reward_weights must have a sum above 0 with --reward_combine mean: change them, or use sum."


def _rollout(c: RLConfig) -> Iterator[str]:
    if c.top_p != 1.0:
        yield (
            f"--top_p {c.top_p} cannot be trained on: log-probabilities of a cut distribution differ from the model's; "
            "use --top_p 1."
        )
    if c.rollout_engine is EngineName.TRANSFORMERS:
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
    if c.uses_reference and c.use_kl_loss and c.kl_estimator is KLEstimator.K1:
        yield (
            "--kl_estimator k1 has zero expected gradient as a loss: with --use_kl_loss choose --kl_estimator k2 or k3, "
            "or leave --use_kl_loss out."
        )
    if c.uses_reference and not c.use_kl_loss and c.kl_estimator is not KLEstimator.K1:
        yield f"--kl_estimator {c.kl_estimator} belongs in the loss: add --use_kl_loss, or use --kl_estimator k1."
    yield from policy_loss_problems(c)
    yield from lora_sync_problems(c)
    yield from lora_dropout_problems(c)
    yield from _useless(c)


def _useless(c: RLConfig) -> Iterator[str]:
    """Settings of advantages that the estimator ignores."""
    estimator = c.advantage_estimator
    if isinstance(estimator, Hook):
        for name in c.changed("gamma", "lambd", "reward_clip_range", "no_advantage_std_norm"):
            yield f"--{name} has no effect with --advantage_estimator {estimator}, whose result is used as it is: leave it out."
    if c.no_advantage_std_norm and estimator in (AdvantageEstimator.GROUP_NORM, AdvantageEstimator.DR_GRPO):
        yield f"--no_advantage_std_norm has no effect with --advantage_estimator {estimator}: leave it out."


def _training(c: RLConfig) -> Iterator[str]:
    yield from train_problems(c, c)
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
    yield from model_problems(c)
    yield from parallel_problems(c, c)
    # The longest sequence must fit one micro-batch of a ring.
    if c.max_tokens_per_gpu * c.ring_attn_size < c.prompt_max_len + c.generate_max_len:
        ring = f" x --ring_attn_size {c.ring_attn_size}" if c.ring_attn_size > 1 else ""
        yield (
            f"--max_tokens_per_gpu {c.max_tokens_per_gpu}{ring} is less than the longest sequence (--prompt_max_len "
            f"{c.prompt_max_len} + --generate_max_len {c.generate_max_len}): raise it or lower one of the others."
        )
    if c.eval_at_start and c.eval_dataset is None:
        yield "--eval_at_start needs --eval_dataset: add it or leave the first out."


def _placement(c: RLConfig) -> Iterator[str]:
    roles = {
        "actor": (c.actor_num_nodes, c.actor_num_gpus_per_node),
        "critic": (c.critic_num_nodes, c.critic_num_gpus_per_node),
        "ref": (c.ref_num_nodes, c.ref_num_gpus_per_node),
        "reward": (c.reward_num_nodes, c.reward_num_gpus_per_node),
    }

    def differ(a: str, b: str) -> bool:
        (nodes_a, gpus_a), (nodes_b, gpus_b) = roles[a], roles[b]
        return nodes_a != nodes_b or ("auto" not in (gpus_a, gpus_b) and gpus_a != gpus_b)

    def mismatch(switch: str, a: str, b: str) -> str:
        (nodes_a, gpus_a), (nodes_b, gpus_b) = roles[a], roles[b]
        return (
            f"--{switch} puts {a} and {b} on the same GPUs, but --{a}_num_nodes x --{a}_num_gpus_per_node is "
            f"{nodes_a} x {gpus_a} and --{b}_num_nodes x --{b}_num_gpus_per_node is {nodes_b} x {gpus_b}: make them equal."
        )

    if c.colocate_all_models and c.colocate_critic_reward:
        yield "--colocate_all_models already includes --colocate_critic_reward: leave the second out."
    if (c.colocate_actor_ref or c.colocate_all_models) and c.loads_reference and differ("actor", "ref"):
        yield mismatch("colocate_all_models" if c.colocate_all_models else "colocate_actor_ref", "actor", "ref")
    shares = c.colocate_critic_reward and c.uses_critic and bool(c.reward_models)
    if shares and differ("critic", "reward"):
        yield mismatch("colocate_critic_reward", "critic", "reward")
    if c.colocate_all_models and c.uses_critic and differ("actor", "critic"):
        yield mismatch("colocate_all_models", "actor", "critic")
    if c.colocate_all_models and c.reward_models and differ("actor", "reward"):
        yield mismatch("colocate_all_models", "actor", "reward")


def _output(c: RLConfig) -> Iterator[str]:
    yield from output_problems(c, evaluates=c.eval_dataset is not None)
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


def check_mixture(path: str, kind: str) -> None:
    """Raise ConfigError for a model (of type ``kind``) without a router to balance."""
    if kind not in MIXTURES:
        raise ConfigError(
            f"--aux_loss_coef balances the experts of a mixture ({', '.join(MIXTURES)}), but --pretrain {path} is a {kind} model: "
            "leave it out."
        )


def model_problems(c: ModelSettings) -> Iterator[str]:
    """Faults of the model flags of any command."""
    for name in ("gradient_checkpointing_use_reentrant", "gradient_checkpointing_above"):
        if c.changed(name) and not c.gradient_checkpointing:
            yield f"--{name} needs --gradient_checkpointing: add it or leave the first out."
    if c.gradient_checkpointing_use_reentrant and c.gradient_checkpointing_above > 0:
        yield (
            "--gradient_checkpointing_above is not for the kind of --gradient_checkpointing_use_reentrant, which needs the same "
            "layers on all workers: leave one of them out."
        )
    if c.gradient_checkpointing_use_reentrant and c.aux_loss_coef > 0:
        yield (
            "--aux_loss_coef with --gradient_checkpointing_use_reentrant would have no gradient, since that kind hides the "
            "router from it: leave the second out."
        )
    if c.load_in_4bit and c.lora_rank == 0:
        yield "--load_in_4bit freezes the weights and trains an adapter: add --lora_rank, or leave --load_in_4bit out."
    if c.lora_rank == 0 and (c.lora_dropout > 0 or c.target_modules != (ALL_LINEAR,)):
        yield "--lora_dropout and --target_modules are about an adapter: add --lora_rank, or leave them out."
    if ALL_LINEAR in c.target_modules and len(c.target_modules) > 1:
        yield f"--target_modules {' '.join(c.target_modules)}: give {ALL_LINEAR} alone, or names without it."


def train_problems(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    """Faults of the training flags of any command. ``model``: the model flags of the same command."""
    if model.load_in_4bit and c.zero_stage == 3:
        yield "--load_in_4bit with --zero_stage 3: quantised weights are not sharded, use --zero_stage 0, 1 or 2."
    yield from _backend(c, model)
    if c.grad_accum_dtype is GradAccumDtype.BF16 and not model.bf16:
        yield "--grad_accum_dtype bf16 needs gradients in bfloat16: add --bf16, or leave the first out."
    if c.ring_head_stride > 1 and c.ring_attn_size == 1:
        yield f"--ring_head_stride {c.ring_head_stride} is about a ring of processes: add --ring_attn_size, or leave it out."
    if not c.packing_samples and c.micro_train_batch_size not in ("auto", 1):
        yield (
            f"--micro_train_batch_size {c.micro_train_batch_size} needs packing but --no_packing_samples is set: "
            "leave one of them out."
        )
    if not all(0 <= beta < 1 for beta in c.adam_betas):
        yield f"--adam_betas {c.adam_betas[0]:g} {c.adam_betas[1]:g} must both be at least 0 and below 1."
    yield from _schedule_problems(c)


def _backend(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    """What one of the backends cannot do, or only in some layouts."""
    sharded = c.zero_stage > 0 and not model.load_in_4bit
    if model.gradient_checkpointing_above > 0 and c.backend is BackendName.DEEPSPEED and c.zero_stage == 3:
        yield (
            "--gradient_checkpointing_above with --backend deepspeed and --zero_stage 3: workers would gather other layers, each "
            "by its own pack: leave the first out."
        )
    if c.deepcompile and c.backend is not BackendName.DEEPSPEED:
        yield f"--deepcompile is DeepSpeed's compiler but --backend is {c.backend}: leave it out."
    if c.deepcompile:
        yield (
            "--deepcompile needs CUDA and one graph for all steps, but packed batches have another segment table in each: "
            "leave it out."
        )
    if c.zpg > 1 and (c.backend is not BackendName.DEEPSPEED or c.zero_stage != 3):
        yield (
            f"--zpg {c.zpg} needs --backend deepspeed and --zero_stage 3, where weights are gathered for each pass, but they are "
            f"{c.backend} and {c.zero_stage}: change them, or leave --zpg out."
        )
    if c.grad_accum_dtype is GradAccumDtype.BF16 and (c.backend is not BackendName.DEEPSPEED or not sharded):
        yield (
            "--grad_accum_dtype bf16 needs --backend deepspeed with --zero_stage 1, 2 or 3 and without --load_in_4bit, all "
            "else adds up in float32: change that, or leave it out."
        )


def _schedule_problems(c: TrainSettings) -> Iterator[str]:
    kind = c.lr_scheduler
    # Which schedules read each flag.
    used = {
        "min_lr_ratio": kind.follows_a_loss
        or kind.endswith("with_min_lr")
        or kind in (Scheduler.POLYNOMIAL, Scheduler.WARMUP_STABLE_DECAY),
        "lr_num_cycles": kind.startswith("cosine") or kind is Scheduler.WARMUP_STABLE_DECAY,
        "lr_power": kind is Scheduler.POLYNOMIAL,
        "lr_decay_ratio": kind is Scheduler.WARMUP_STABLE_DECAY,
        "lr_factor": kind.follows_a_loss,
        "lr_patience": kind.follows_a_loss,
        "max_lr_ratio": kind is Scheduler.GREEDY,
    }
    for name, value in c.changed(*used).items():
        if not used[name]:
            yield f"--{name} {value:g} has no effect with --lr_scheduler {kind}: leave it out, or choose another schedule."
    if kind is Scheduler.WARMUP_STABLE_DECAY and c.lr_warmup_ratio + c.lr_decay_ratio > 1:
        yield (
            f"--lr_warmup_ratio {c.lr_warmup_ratio:g} and --lr_decay_ratio {c.lr_decay_ratio:g} are more than the whole run: "
            "lower one of them."
        )


def output_problems(c: OutputSettings, *, evaluates: bool) -> Iterator[str]:
    """Faults of the output flags of any command. ``evaluates``: there is a held-out set."""
    if c.best_metric_key != NO_METRIC and not evaluates:
        yield f"--best_metric_key {c.best_metric_key} is measured on held-out data: add --eval_dataset, or leave it out."
    if c.best_metric_key == NO_METRIC and c.best_metric_mode != "auto":
        yield f"--best_metric_mode {c.best_metric_mode} says which values are good, but of no metric: add --best_metric_key."
    if c.save_hf_ckpt and c.save_steps <= 0:
        yield "--save_hf_ckpt writes with each checkpoint: set --save_steps to a positive number."
    if c.disable_ds_ckpt and not c.save_hf_ckpt:
        yield "--disable_ds_ckpt without --save_hf_ckpt leaves nothing to save: add the second or leave the first out."
    if c.use_ds_universal_ckpt and not c.load_checkpoint:
        yield "--use_ds_universal_ckpt is about loading a checkpoint: add --load_checkpoint, or leave the first out."
    if c.save_steps == 0:
        yield "--save_steps must be positive, or -1."
