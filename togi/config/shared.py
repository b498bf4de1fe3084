"""Settings that several commands share, in groups. Each has one flat name; established names are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from togi.config.choices import BackendName, GradAccumDtype, Layers, Scheduler
from togi.config.fields import Count, Int, PathText, Settings, flag, later

PLAIN_TEMPLATE = "User: {}\nAssistant: "
"""The format of a prompt without a chat template."""
ALL_LINEAR = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"
"""The file that marks the folder of a LoRA adapter."""
NO_METRIC = "none"
# Mixtures of experts whose router is known to be read correctly, by model type.
MIXTURES = ("mixtral", "qwen3_moe")
# Model types whose layers --ds_tensor_parallel_size can split.
SPLITTABLE = ("llama", "qwen2", "qwen3", "mistral")
# Model types whose compiled layers were shown to be equal. A mixture's experts get varying numbers of tokens.
COMPILABLE = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class LoRA:
    """The settings of an adapter. ``target_modules``: names of layers, or all-linear alone."""

    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    load_in_4bit: bool


@dataclass(frozen=True, slots=True)
class Recompute:
    """The settings of activation checkpointing. ``above``: packs of up to this many tokens keep all activations."""

    use_reentrant: bool = False
    above: int = 0


class PromptText(Protocol):
    """The settings that format a prompt, in any command."""

    @property
    def apply_chat_template(self) -> bool: ...
    @property
    def input_template(self) -> str | None: ...
    @property
    def tokenizer_chat_template(self) -> str | None: ...


class ModelSettings(Settings):
    """Model"""

    pretrain: PathText = flag("", "Model to train: a Hugging Face folder or hub name. Required.")
    bf16: bool = flag(False, "Compute in bfloat16; the master weights stay float32.")
    flash_attn: bool = flag(
        False, "Use FlashAttention where the device has it (CUDA); elsewhere segments run through SDPA."
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    gradient_checkpointing_use_reentrant: bool = flag(False, "Use the re-entrant variant of gradient checkpointing.")
    gradient_checkpointing_above: Int = flag(
        0, "Recompute no more layers than needed to keep the activations of a pack of this many tokens; 0: all.", ge=0
    )
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(
        False, "Run code that comes with a model folder. Off by default: it can do anything."
    )
    disable_fast_tokenizer: bool = flag(
        False, "Accepted for established commands; changes nothing: Transformers has one tokenizer for each model."
    )
    use_liger_kernel: bool = flag(
        False, "Compute norms, rotary embeddings and MLPs with Liger's kernels where the device has them (CUDA)."
    )
    torch_compile: bool = flag(
        False, "Compile the layers with torch.compile at the first batches; what is built is kept for later runs."
    )
    aux_loss_coef: float = flag(
        0.0, "Weight of the load-balancing loss of a mixture of experts, a mean over sequences; 0 turns it off.", ge=0
    )
    load_in_4bit: bool = flag(False, "Hold the frozen weights in NF4 (QLoRA); needs --lora_rank.")
    lora_rank: Int = flag(0, "Train an adapter of this rank beside frozen weights (LoRA); 0 trains all weights.", ge=0)
    lora_alpha: Int = flag(16, "LoRA scale: the adapter's output is multiplied by alpha / rank.", ge=1)
    target_modules: tuple[str, ...] = flag(
        (ALL_LINEAR,), "Linear layers that get an adapter, by the last part of their names, or all-linear."
    )
    lora_dropout: float = flag(0.0, "Dropout before the adapter, in training.", ge=0, lt=1)
    use_ms: bool = flag(False, "Take names of models and data sets from ModelScope instead of the Hugging Face hub.")

    def layers(self, *, on_cuda: bool) -> Layers:
        """The implementation of the layers on this kind of device. Liger's kernels are for CUDA."""
        if self.torch_compile:
            return Layers.COMPILED
        return Layers.LIGER if self.use_liger_kernel and on_cuda else Layers.STANDARD

    @property
    def recompute(self) -> Recompute | None:
        """The settings of recomputation; None if all activations are kept."""
        if not self.gradient_checkpointing:
            return None
        return Recompute(self.gradient_checkpointing_use_reentrant, self.gradient_checkpointing_above)

    @property
    def lora(self) -> LoRA | None:
        """The adapter to train; None if all weights are trained."""
        if self.lora_rank == 0:
            return None
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_dropout, self.target_modules, self.load_in_4bit)


class TrainSettings(Settings):
    """Training"""

    train_batch_size: Count = flag(128, "Samples per optimizer step, over all workers.")
    micro_train_batch_size: Count | Literal["auto"] = flag(
        "auto", "At most this many samples per forward and backward; auto: as many as --max_tokens_per_gpu allows."
    )
    max_tokens_per_gpu: Count = flag(16384, "Token budget of one packed micro-batch on one worker.")
    packing_samples: bool = flag(
        True, "Pack sequences without padding; --no_packing_samples runs one sequence at a time."
    )
    max_epochs: Count = flag(1, "Passes over the data (RL: over each rollout).")
    max_norm: float = flag(1.0, "Clip the global gradient norm to this; 0 turns clipping off.", ge=0)
    l2: float = flag(0.0, "AdamW weight decay (not on biases and norm weights).", ge=0)
    adam_betas: tuple[float, float] = flag((0.9, 0.95), "AdamW betas.")
    lr_scheduler: Scheduler = flag(Scheduler.COSINE_WITH_MIN_LR, "Learning-rate schedule, counted in optimizer steps.")
    lr_warmup_ratio: float = flag(0.03, "Warm-up steps = ceil(ratio x total optimizer steps).", ge=0, le=1)
    min_lr_ratio: float = flag(
        0.1,
        "Lowest learning rate as a share of the peak, of schedules with a floor (also polynomial's end).",
        ge=0,
        le=1,
    )
    lr_num_cycles: float | None = flag(
        None, "Waves of a cosine (default: half a wave), or how often cosine_with_restarts falls (default: 1).", gt=0
    )
    lr_power: float = flag(1.0, "Exponent of --lr_scheduler polynomial.", gt=0)
    lr_decay_ratio: float = flag(
        0.1, "Steps of the fall in warmup_stable_decay = ceil(ratio x total optimizer steps).", ge=0, le=1
    )
    lr_factor: float | None = flag(
        None,
        "What reduce_lr_on_plateau and greedy multiply the rate by when the held-out loss no longer falls "
        "(default: 0.1 and 0.95); greedy divides by it while the loss falls.",
        gt=0,
        lt=1,
    )
    lr_patience: Int = flag(
        10, "reduce_lr_on_plateau and greedy change the rate after more than so many evaluations of one kind.", ge=0
    )
    max_lr_ratio: float = flag(10.0, "Highest rate of greedy as a multiple of the learning rate it starts from.", ge=1)
    seed: Int = flag(42, "Seed of data order, sampling and initialisation.")
    full_determinism: bool = flag(
        False,
        "Deterministic kernels; a run repeats bit for bit on the same machine, but for log-probs that vLLM rounds by its batches.",
    )
    backend: BackendName = flag(BackendName.FSDP2, "Training backend.")
    zero_stage: Int = flag(2, "0 replicates; 1, 2 shard gradients and optimizer; 3 shards weights too.", ge=0, le=3)
    adam_offload: bool = flag(False, "Keep master weights and Adam's moments in host memory, and run AdamW there.")
    zpg: Count = flag(
        1,
        "ZeRO++: ranks that keep one more copy of the weights among them, for the backward pass (DeepSpeed, stage 3).",
    )
    grad_accum_dtype: GradAccumDtype = flag(
        GradAccumDtype.FP32,
        "In which numbers micro-batches are added up; bf16 is DeepSpeed's only and loses small terms.",
    )
    overlap_comm: bool = flag(
        False, "Overlap DeepSpeed's communication with the backward pass; FSDP2 always does so, with or without."
    )
    deepcompile: bool = flag(False, "DeepSpeed's compiler. Refused: it cannot compile packed batches.")
    ring_attn_size: Count = flag(
        1, "Compute each batch on this many processes, each holding its part of the tokens (ring attention)."
    )
    ring_head_stride: Count = flag(
        1, "Key/value heads exchanged per ring step, a divisor of their number: more means fewer and larger messages."
    )
    ds_tensor_parallel_size: Count = flag(
        1, "Split the weights and heads of each layer over this many processes (tensor parallelism, by FSDP2)."
    )
    local_rank: Int = later(
        -1, "Set by launchers that start one process per device; this command starts its own workers."
    )


class OutputSettings(Settings):
    """Output"""

    run_dir: PathText | None = flag(None, "Folder of everything the run leaves behind; default runs/<command>-<time>.")
    save_path: PathText = flag("./ckpt", "Folder of the final model in Hugging Face format.")
    ckpt_path: PathText = flag("./ckpt/checkpoints", "Folder of resumable checkpoints.")
    save_steps: Int = flag(-1, "Write a checkpoint every N steps (RL: rollouts); -1 never.")
    save_hf_ckpt: bool = flag(False, "With each checkpoint also write the model in Hugging Face format.")
    disable_ds_ckpt: bool = flag(False, "Do not write the resumable part of checkpoints (needs --save_hf_ckpt).")
    max_ckpt_num: Count = flag(3, "Keep at most this many checkpoints; the newest is never removed.")
    max_ckpt_mem: float = flag(1e8, "Keep at most this many GB of checkpoints.", gt=0)
    load_checkpoint: bool = flag(False, "Continue from the newest complete checkpoint in --ckpt_path, if there is one.")
    use_ds_universal_ckpt: bool = flag(
        False,
        "Load a checkpoint of another number of workers, ZeRO stage or backend. Always possible here, with or without.",
    )
    best_metric_key: str = flag(
        NO_METRIC,
        "Metric of the evaluations, such as eval/loss, whose best model is kept in <ckpt_path>/best; none: no model.",
    )
    best_metric_mode: Literal["auto", "min", "max"] = flag(
        "auto", "Which values of --best_metric_key are good; auto: low losses, high rewards and accuracies."
    )
    logging_steps: Count = flag(1, "Send metrics to the trackers every N steps (metrics.jsonl has every step).")
    use_wandb: str | None = flag(
        None, "Weights & Biases: an API key, or any word when logged in or WANDB_API_KEY is set."
    )
    wandb_org: str | None = flag(None, "Weights & Biases entity.")
    wandb_group: str | None = flag(None, "Weights & Biases group.")
    wandb_project: str = flag("togi", "Weights & Biases project.")
    wandb_run_name: str | None = flag(None, "Weights & Biases run name; default: the run folder's name.")
    use_tensorboard: PathText | None = flag(None, "TensorBoard folder.")
