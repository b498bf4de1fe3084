"""The settings of ``togi rl`` (established name: ``train_ppo_ray``). Their rules are in ``rl_checks``."""

from collections.abc import Mapping
from typing import Literal

from togi.config import choices
from togi.config.fields import (
    Count,
    CountOrAuto,
    FromZero,
    HookField,
    HooksField,
    Int,
    OpenShare,
    PathText,
    Positive,
    Settings,
    Share,
    flag,
)
from togi.config.presets import preset_values
from togi.config.shared import MAX_BAD_ROWS, ModelSettings, OutputSettings, TrainSettings, VLLMSettings


class SampleSettings(Settings):
    """Filtering and length penalties"""

    dynamic_filtering: bool = flag(
        False,
        "Train only on groups whose mean reward lies inside --dynamic_filtering_reward_range; each other one is replaced by that "
        "of another prompt, until the rollout is full or the episode ends (DAPO).",
    )
    dynamic_filtering_reward_range: tuple[float, float] = flag(
        (0.0, 1.0), "The open range, of the reward before length penalties: a mean that is one of its ends is outside."
    )
    dynamic_filtering_max_generations: Count = flag(20, "Stop when a rollout is not full after so many times its size.")
    overlong_buffer_len: Count | None = flag(None, "Responses lose reward linearly in the last so many tokens (DAPO).")
    overlong_penalty_factor: Positive = flag(1.0, "What a response of --generate_max_len tokens loses.")
    stop_properly_penalty_coef: float | None = flag(
        None,
        "Reward of a response cut off by the limit: from 0 to 1 it is multiplied by this, below 0 replaced by it (ProRL).",
        le=1,
    )

    @property
    def uses_length_penalties(self) -> bool:
        return self.overlong_buffer_len is not None or self.stop_properly_penalty_coef is not None


class PretrainMixSettings(Settings):
    """SFT mixing"""

    pretrain_data: PathText | None = flag(
        None,
        "Texts that the actor goes on learning: --ptx_coef x their mean negative log-probability a token is added to the policy "
        "loss of every update (PPO-ptx).",
    )
    ptx_coef: Positive = flag(0.05, "Weight of the loss on --pretrain_data.")
    pretrain_data_probs: str | None = flag(None, "Probabilities of the sets, comma-separated; default: concatenate.")
    pretrain_split: str = flag("train", "Split of these sets.")
    pretrain_input_key: str = flag("input", "Field with the text, or with the prompt beside --pretrain_output_key.")
    pretrain_output_key: str | None = flag(None, "Field with the response, which alone is learned; default: learn all.")
    pretrain_max_len: Count | None = flag(None, "Longer rows are left out; default prompt_max_len + generate_max_len.")
    pretrain_max_samples: Count = flag(100_000_000, "Use at most this many rows of the mixture.")
    pretrain_batch_size: Count | None = flag(None, "Rows in each of the actor's updates; default --train_batch_size.")


class RewardSettings(Settings):
    """Reward"""

    reward_func: PathText | None = flag(
        None,
        "Python files that define reward_func(queries, prompts, labels), comma-separated; builtin:NAME for one that "
        f"comes with Togi ({', '.join(choices.Verifier)}).",
    )
    format_regex: str | None = flag(None, "Python regular expression that builtin:format matches with the response.")
    length_target: Count | None = flag(None, "The length of a response that builtin:length rewards most, in tokens.")
    length_shape: choices.LengthShape = flag(
        choices.LengthShape.LINEAR, "How builtin:length falls off: linear, or cosine, which is flat near the target."
    )
    remote_rm_url: PathText | None = flag(None, "Reward servers, comma-separated URLs; a .py path is a --reward_func.")
    reward_pretrain: PathText | None = flag(None, "Local reward models with a scalar head, comma-separated.")
    remote_rm_mode: choices.RemoteMode = flag(
        choices.RemoteMode.BALANCE,
        "Several URLs. balance: equal servers, each group goes to the least busy one (as established). "
        "ensemble: different rewards, each URL scores every sample.",
    )
    reward_combine: choices.RewardCombination = flag(
        choices.RewardCombination.SUM,
        "How several rewards become one: their weighted sum, or that divided by the sum of weights.",
    )
    reward_weights: tuple[float, ...] | None = flag(
        None, "One weight per reward: reward models, then servers, then functions, as given; default 1 for each."
    )
    normalize_reward: bool = flag(False, "Standardise a reward model's output with the mean and std of its config.")
    reward_timeout: Positive = flag(60.0, "Seconds one call of a reward function or server may take.")
    reward_workers: Count = flag(2, "Processes that run a reward function.")
    reward_retries: Int = flag(1, "How often a call is repeated after a timeout, killed process or I/O error.", ge=0)
    remote_rm_concurrency: Count = flag(64, "Requests at the same time to one reward server.")
    remote_rm_max_pause: Positive = flag(3600.0, "Seconds to wait for a reward server that is down, before stopping.")
    on_reward_error: choices.OnRewardError = flag(
        choices.OnRewardError.DROP_GROUP,
        "Samples whose reward failed: leave out their group, leave out only them, or stop the run.",
    )
    max_reward_errors: Share = flag(0.1, "Largest share of samples whose reward may fail; above it the run stops.")

    @property
    def generates(self) -> bool:
        """Whether rollouts are generated and scored."""
        return True

    @property
    def acts(self) -> bool:
        """Whether the policy acts in an environment, and does not answer prompts alone."""
        return False

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Folders or hub names of the local reward models."""
        return _listed(self.reward_pretrain)

    @property
    def reward_urls(self) -> tuple[str, ...]:
        """URLs of the reward servers."""
        return tuple(item for item in _listed(self.remote_rm_url) if not item.endswith(".py"))

    @property
    def reward_files(self) -> tuple[str, ...]:
        """Paths of the reward function files, given under either name, and names of built-in functions."""
        remote = tuple(item for item in _listed(self.remote_rm_url) if item.endswith(".py"))
        return _listed(self.reward_func) + remote

    def verifier_settings(self, verifier: choices.Verifier) -> dict[str, str]:
        """The keyword arguments of a built-in function, from its own flags."""
        if verifier is choices.Verifier.FORMAT and self.format_regex is not None:
            return {"format_regex": self.format_regex}
        if verifier is choices.Verifier.LENGTH:
            return {"length_target": str(self.length_target), "length_shape": self.length_shape}
        return {}

    @property
    def allowed_reward_errors(self) -> float:
        """The largest share of the samples that are scored together (a rollout, a round) whose reward may fail."""
        return 0.0 if self.on_reward_error is choices.OnRewardError.STOP else self.max_reward_errors

    @property
    def remote_sources(self) -> int:
        """The number of rewards from servers: servers that share the samples count as one."""
        count = len(self.reward_urls)
        return count if self.remote_rm_mode is choices.RemoteMode.ENSEMBLE else min(1, count)


def verifier_of(item: str) -> choices.Verifier | None:
    """The built-in function named by an item of ``--reward_func``; None for a file. Raises ValueError for an unknown name."""
    return choices.Verifier(item.removeprefix(choices.BUILTIN)) if item.startswith(choices.BUILTIN) else None


def _listed(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(item.strip() for item in text.split(",") if item.strip())


class PromptSettings(Settings):
    """Prompts"""

    prompt_data: PathText = flag("", "Prompt sets, comma-separated: files, folders, hub names, or name@dir. Required.")
    prompt_data_probs: str | None = flag(None, "Probabilities of the sets, comma-separated; default: concatenate.")
    prompt_split: str = flag("train", "Split of the prompt sets.")
    input_key: str = flag("input", "Field with the prompt: a string or a list of chat messages.")
    label_key: str | None = flag(None, "Field given to the reward as the label, such as the reference answer.")
    input_template: str | None = flag(None, "Format string with one {} around the prompt, without a chat template.")
    apply_chat_template: bool = flag(False, "Render prompts with the tokenizer's chat template.")
    prompt_max_len: Count = flag(1024, "Prompts of more tokens are dropped and counted, never cut.")
    max_samples: Count = flag(100_000_000, "Use at most this many prompts of the mixture.")


class RolloutSettings(VLLMSettings):
    """Rollout"""

    rollout_engine: choices.EngineName = flag(choices.EngineName.VLLM, "What generates; Transformers needs no install.")
    rollout_batch_size: Count = flag(1024, "Prompts per rollout.")
    n_samples_per_prompt: Count = flag(1, "Responses per prompt.")
    generate_max_len: Count = flag(1024, "At most this many new tokens per response.")
    max_len: Count | None = flag(None, "Context length of the engine; default --prompt_max_len + --generate_max_len.")
    temperature: Positive = flag(1.0, "Sampling temperature; training divides the logits by the same number.")
    top_p: float = flag(1.0, "Nucleus sampling. Only 1 can be trained on, as a cut changes the ratios.", gt=0, le=1)
    micro_rollout_batch_size: Count | Literal["auto"] = flag(
        "auto", "At most this many samples per scoring forward; auto: as many as --max_tokens_per_gpu allows."
    )
    vllm_num_engines: CountOrAuto = flag("auto", "Generation engines; auto: as many as the actor's GPUs hold, or 1.")
    vllm_tensor_parallel_size: Count = flag(1, "GPUs of one node per engine; without GPUs: processes per engine.")
    vllm_gpu_memory_utilization: OpenShare | Literal["auto"] = flag(
        "auto", "Share of a GPU's memory that vLLM may take; auto: 0.9, beside models 0.5."
    )
    max_num_seqs: Count | None = flag(
        None, "At most this many responses in progress in an engine; default: what vLLM takes for the GPU."
    )
    allow_uncorrected_rollouts: bool = flag(
        False, "Let fp8 in vLLM, or tokens of older weights, be trained on without --enable_vllm_is_correction."
    )
    enable_prefix_caching: bool = flag(True, "vLLM prefix cache for common prompts; emptied at every weight update.")
    vllm_sync_backend: choices.SyncBackend = flag(
        choices.SyncBackend.AUTO,
        "What carries weights to the engines: a process group over nccl (between processes on one GPU: CUDA IPC) or gloo; "
        "auto: nccl on GPUs, without them host memory on one host and gloo across hosts.",
    )
    vllm_sync_with_ray: bool = flag(False, "Let Ray's object store carry the weights, across hosts too.")
    lora_sync: choices.LoraSync = flag(
        choices.LoraSync.AUTO,
        "What engines are sent under --lora_rank: adapters, which each engine merges into the weights of its own model files, or "
        "whole merged weights; auto: adapters, but merged with --load_in_4bit, whose rounded base is in no file.",
    )
    vllm_enable_sleep: bool = flag(False, "Engines give back their cache while models train (--colocate_all_models).")
    trainer_enable_sleep: bool = flag(False, "Actor and critic put optimizer states and masters away between updates.")
    deepspeed_enable_sleep: bool = flag(False, "The established name of --trainer_enable_sleep.")
    replay: PathText | None = flag(None, "Train on the rollouts of this run folder, without engines and rewards.")
    weight_sync_timeout: Positive = flag(600.0, "Seconds after which an unfinished weight update is an error.")


class EnvironmentSettings(Settings):
    """Environments and agents"""

    environment: HooksField | None = flag(
        None,
        "FILE.py:Class with reset(**row), tools as public methods (or step(action)) and reward(); several as name=FILE.py:Class, "
        "comma-separated, of which the column 'environment' of a row names its own.",
    )
    agent: PathText | None = flag(
        None,
        "FILE.py:run, an async def run(base_url, task) that returns the reward, or a command in quotes: any agent that speaks to "
        "an OpenAI-compatible server.",
    )
    max_turns: Count = flag(16, "An episode ends after so many answers of the policy.")
    max_tool_seconds: Positive = flag(60.0, "Seconds one call of a tool or environment may take.")
    agent_timeout: Positive = flag(1800.0, "Seconds an agent may take for one episode.")
    max_observation_chars: Count = flag(20_000, "Longer results of a tool are cut in the middle, which is counted.")
    episode_processes: Count = flag(256, "At most so many episodes at once, each in a process of its own.")


class AsyncSettings(Settings):
    """Asynchronous RL"""

    max_staleness: Int = flag(
        0,
        "So many rollouts may be in work beyond the one that is trained; 0: each is generated by the weights that learn from it.",
        ge=0,
    )
    on_stale: choices.OnStale = flag(
        choices.OnStale.MASK,
        "What is done about tokens that were sampled more than --max_token_lag updates ago. mask: they are left out of the loss, "
        "their response keeps its reward; wait: training waits, so that there are none; drop: their group is not trained on.",
    )
    max_token_lag: Count | None = flag(
        None, "Oldest tokens that are trained on, in rollouts; default 3 x --max_staleness."
    )
    recompute_kv: bool = flag(
        False, "After a weight update, compute the keys and values of responses in progress again, by the new weights."
    )


class AlgorithmSettings(Settings):
    """Algorithm"""

    algo: choices.Algo | None = flag(
        None,
        "Start from the published settings of an algorithm; what is given otherwise wins, and sizes are not part of it.",
    )
    advantage_estimator: choices.AdvantageEstimator | HookField = flag(
        choices.AdvantageEstimator.GAE,
        "How rewards become advantages; FILE.py:name for a function of your own (examples/hooks).",
    )
    gamma: float = flag(1.0, "Discount. Group estimators need 1.", gt=0, le=1)
    lambd: Share = flag(1.0, "GAE lambda.")
    turn_discount: float = flag(1.0, "Discount from each turn of an episode to the next, beside --gamma.", gt=0, le=1)
    policy_loss_type: choices.PolicyLossType | HookField = flag(
        choices.PolicyLossType.PPO,
        "Policy objective: ppo clips each token's ratio, gspo one ratio a sequence (published with --eps_clip_low_high 3e-4 "
        "4e-4), cispo the weight of a gradient that is never dropped; FILE.py:name for a function of your own.",
    )
    eps_clip: Positive = flag(0.2, "Clip range of the ratio.")
    eps_clip_low_high: tuple[float, float] | None = flag(None, "Separate lower and upper clip; replaces --eps_clip.")
    dual_clip: float | None = flag(None, "Dual-clip constant c > 1 for negative advantages.", gt=1)
    value_clip: Positive = flag(0.2, "Clip range of the value function.")
    loss_aggregation: choices.Aggregation | Literal["auto"] = flag(
        "auto",
        "How token losses of a step become one number; auto: sequence_mean for gspo, constant for dr_grpo, else token_mean.",
    )
    entropy_loss_coef: FromZero = flag(0.0, "Weight of the policy's entropy, which is subtracted from the loss.")
    enable_vllm_is_correction: bool = flag(False, "Weight the loss by trainer / engine probability of the tokens.")
    vllm_is_correction_type: choices.CorrectionType = flag(
        choices.CorrectionType.TIS,
        "How: tis clips the weights to the range, icepop leaves out tokens beyond it, seq-mask-tis whole sequences.",
    )
    vllm_is_truncated_threshold: tuple[float, float] = flag((0.5, 5.0), "The range, lowest and highest weight.")
    init_kl_coef: FromZero = flag(0.01, "KL coefficient; 0 starts no reference model.")
    kl_estimator: choices.KLEstimator = flag(choices.KLEstimator.K1, "k1 in the reward; k2 or k3 in the loss.")
    use_kl_loss: bool = flag(False, "Put the KL term in the loss instead of the reward.")
    kl_target: Positive | None = flag(None, "If set, adapt the KL coefficient towards this KL.")
    kl_horizon: Count = flag(10_000, "Horizon of the adaptive controller, in samples.")
    reward_clip_range: tuple[float, float] = flag((-10.0, 10.0), "Clip of the scalar reward after the baseline.")
    no_advantage_std_norm: bool = flag(False, "Advantage normalisation subtracts the mean only.")
    share_prompts: bool = flag(True, "Compute what samples of a pack have in common at their start once (exact).")
    freezing_actor_steps: Int = flag(-1, "Warm-up: train only the critic on the first N rollouts; -1, 0: none.", ge=-1)
    enable_ema: bool = flag(False, "Save an exponential moving average of the actor's weights too: save_path + _ema.")
    ema_beta: float = flag(0.992, "Decay of the average in each optimizer step.", gt=0, lt=1)


class RLTrainSettings(Settings):
    """RL training"""

    max_bad_rows: float = MAX_BAD_ROWS
    num_episodes: Count = flag(1, "Passes over the prompt set.")
    max_steps: Int = flag(-1, "Stop after this many rollouts; -1: after all episodes.")
    actor_learning_rate: FromZero = flag(1e-6, "Peak learning rate of the actor.")
    critic_learning_rate: FromZero = flag(9e-6, "Peak learning rate of the critic.")
    critic_pretrain: PathText | None = flag(None, "Model of the critic; default: a reward model, or --pretrain.")
    value_head_prefix: str = flag("score", "Attribute name of the scalar head; a model's own config wins.")
    save_value_network: bool = flag(False, "Save the critic at the end (save_path + _critic).")


class PlacementSettings(Settings):
    """Placement"""

    workers: choices.WorkersKind = flag(
        choices.WorkersKind.AUTO,
        "local: models and engine are objects of this process, which needs no Ray and suits notebooks and debuggers; ray: each "
        "has processes of its own; auto: local where one process is enough.",
    )
    actor_num_nodes: Count = flag(1, "Nodes of the actor.")
    actor_num_gpus_per_node: CountOrAuto = flag("auto", "GPUs per node, without GPUs: processes; auto: all GPUs, or 1.")
    critic_num_nodes: Count = flag(1, "Nodes of the critic.")
    critic_num_gpus_per_node: CountOrAuto = flag("auto", "As for the actor; auto: like the actor.")
    ref_num_nodes: Count = flag(1, "Nodes of the reference model.")
    ref_num_gpus_per_node: CountOrAuto = flag("auto", "As for the actor; auto: like the actor.")
    reward_num_nodes: Count = flag(1, "Nodes of the reward model.")
    reward_num_gpus_per_node: CountOrAuto = flag("auto", "As for the actor; auto: like the actor.")
    colocate_actor_ref: bool = flag(False, "Actor and reference share GPUs.")
    colocate_critic_reward: bool = flag(False, "Critic and reward model share GPUs.")
    colocate_all_models: bool = flag(False, "All models and the engines share the actor's GPUs.")
    ref_reward_offload: bool = flag(
        False,
        "Keep reference and reward models in host memory while they do not compute; without a GPU they are there anyway.",
    )


class HealingSettings(Settings):
    """Healing"""

    max_restarts: Int = flag(
        3,
        "At most this many restarts of what died, engines in their place and the run from its checkpoint together.",
        ge=0,
    )
    engine_timeout: Positive = flag(
        300.0, "Seconds one step of an engine may take; after them it counts as dead (Ray)."
    )
    stall_timeout: Positive = flag(
        1800.0, "Seconds without any answer of a worker after which the run writes all stacks to its folder and ends."
    )


class EvaluationSettings(Settings):
    """Evaluation"""

    eval_dataset: PathText | None = flag(None, "Held-out prompt sets, with the same keys as --prompt_data.")
    eval_split: str = flag("train", "Split of the evaluation sets.")
    eval_steps: Int = flag(-1, "Evaluate every N rollouts; -1: at the end of each episode.")
    eval_at_start: bool = flag(False, "Also evaluate before the first update.")
    eval_temperature: FromZero = flag(0.6, "Sampling temperature in evaluation; 0 is greedy.")
    eval_n_samples_per_prompt: Count = flag(4, "Responses per prompt in evaluation.")


class RLConfig(
    ModelSettings,
    PromptSettings,
    RewardSettings,
    RolloutSettings,
    EnvironmentSettings,
    AsyncSettings,
    SampleSettings,
    PretrainMixSettings,
    AlgorithmSettings,
    RLTrainSettings,
    TrainSettings,
    EvaluationSettings,
    PlacementSettings,
    HealingSettings,
    OutputSettings,
):
    """Online RL of a language model."""

    ckpt_path: PathText = flag("./ckpt/checkpoints_ppo_ray", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_rl", "Weights & Biases project.")

    def preset(self, given: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
        """The published settings of ``--algo``, and the correction for tokens of older weights with ``--max_staleness``.

        Raises ConfigError if they contradict given values.
        """
        corrected = {"enable_vllm_is_correction": True} if self.max_staleness > 0 else {}
        values = {name: value for name, value in corrected.items() if name not in given}
        if self.algo is None:
            return (f"--max_staleness {self.max_staleness}", values) if corrected else ("", {})
        return f"--algo {self.algo}", values | preset_values(self.algo, given, self.generate_max_len)

    @property
    def acts(self) -> bool:
        """Whether the policy acts in an environment or as an agent."""
        return self.environment is not None or self.agent is not None

    @property
    def generates(self) -> bool:
        """Whether rollouts are generated and scored. A replay reads them."""
        return self.replay is None

    @property
    def scoring_models(self) -> tuple[str, ...]:
        """The local reward models to load."""
        return self.reward_models if self.generates else ()

    @property
    def samples_per_rollout(self) -> int:
        """Prompts per rollout x responses per prompt."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on one full rollout: ceil(samples / train_batch_size) x max_epochs."""
        return -(-self.samples_per_rollout // self.train_batch_size) * self.max_epochs

    @property
    def pretrain_rows(self) -> int:
        """Rows of ``--pretrain_data`` in each update of the actor."""
        return self.pretrain_batch_size if self.pretrain_batch_size is not None else self.train_batch_size

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the engine must hold."""
        return self.max_len if self.max_len is not None else self.prompt_max_len + self.generate_max_len

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lower and upper clip of the ratio: it is kept within [1 - low, 1 + high]."""
        return self.eps_clip_low_high if self.eps_clip_low_high is not None else (self.eps_clip, self.eps_clip)

    @property
    def sends_adapter(self) -> bool:
        """Whether only the adapter is sent to the engines, not whole weights."""
        return self.lora is not None and not self.load_in_4bit and self.lora_sync is not choices.LoraSync.MERGED

    @property
    def token_lag(self) -> int:
        """The age in rollouts up to which tokens are trained on."""
        return self.max_token_lag if self.max_token_lag is not None else 3 * self.max_staleness

    @property
    def trainer_sleeps(self) -> bool:
        return self.trainer_enable_sleep or self.deepspeed_enable_sleep

    @property
    def uses_critic(self) -> bool:
        return self.advantage_estimator is choices.AdvantageEstimator.GAE

    @property
    def uses_reference(self) -> bool:
        return self.init_kl_coef > 0

    @property
    def loads_reference(self) -> bool:
        """Whether the reference is a separate model. With LoRA it is the frozen base inside the actor."""
        return self.uses_reference and self.lora is None

    @property
    def aggregation(self) -> choices.Aggregation:
        """The aggregation in use. Dr. GRPO's default is the constant divisor (Liu et al., 2025, section 3.2).

        GSPO's default is the mean over sequences (Zheng et al., 2025, equation 5).
        """
        if self.loss_aggregation != "auto":
            return self.loss_aggregation
        if self.policy_loss_type is choices.PolicyLossType.GSPO:
            return choices.Aggregation.SEQUENCE_MEAN
        is_dr_grpo = self.advantage_estimator is choices.AdvantageEstimator.DR_GRPO
        return choices.Aggregation.CONSTANT if is_dr_grpo else choices.Aggregation.TOKEN_MEAN

    @property
    def critic_source(self) -> str:
        """The model that the critic starts from."""
        return self.critic_pretrain or (self.reward_models[0] if self.reward_models else self.pretrain)
