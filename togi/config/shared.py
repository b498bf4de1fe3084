"""Settings that several commands share, in groups, and the contradictions between them.

Each has one flat name; established names are kept.
What tensor parallelism and compilation cannot be combined with is here too. The settings of one method are in ``togi.methods``.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from togi.config.architectures import MIXTURES, SPLITTABLE
from togi.config.choices import BackendName, EngineName, GradAccumDtype, Layers, Scheduler
from togi.config.fields import Count, FromZero, Int, PathText, Positive, Seed, Settings, Share, flag, later, unread
from togi.errors import ConfigError

PLAIN_TEMPLATE = "User: {}\nAssistant: "
"""The format of a prompt without a chat template."""
# Required settings in words.
MODEL_TO_TRAIN = "the Hugging Face folder or hub name of the model to train"
ROWS = "a JSON, JSONL, CSV, Parquet or Arrow file, a saved data set folder or a hub name"
ALL_LINEAR = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"
"""The file that marks the folder of a LoRA adapter."""
NO_METRIC = "none"
# The outermost parts of language models, whose weights would be taken for those of a head of the same name.
MODEL_PARTS = ("lm_head", "model", "transformer")

# Settings that several groups have.
DISABLE_FAST_TOKENIZER = flag(
    False, "Accepted for established commands; changes nothing: Transformers has one tokenizer for each model."
)
MAX_BAD_ROWS = flag(
    0.05, "Stop before training if a larger share of the rows is faulty; 0 stops at any. They are left out.", ge=0, le=1
)


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
    bf16: bool = flag(False, "Compute in bfloat16; the master weights stay float32. Default: on GPUs that have it.")
    flash_attn: bool = flag(
        True, "PyTorch's FlashAttention where it computes (CUDA in bfloat16); --no_flash_attn takes SDPA there too."
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    gradient_checkpointing_use_reentrant: bool = flag(False, "Use the re-entrant variant of gradient checkpointing.")
    gradient_checkpointing_above: Int = flag(
        0, "Recompute no more layers than needed to keep the activations of a pack of this many tokens; 0: all.", ge=0
    )
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder. Off, as it can do anything.")
    disable_fast_tokenizer: bool = DISABLE_FAST_TOKENIZER
    use_liger_kernel: bool = flag(False, "Compute norms, rotary embeddings and MLPs with Liger's kernels (on CUDA).")
    torch_compile: bool = flag(False, "Compile the layers with torch.compile at the first batches, and for later runs.")
    aux_loss_coef: FromZero = flag(0.0, "Weight of the load-balancing loss of a mixture of experts, by sequence.")
    load_in_4bit: bool = flag(False, "Hold the frozen weights in NF4 (QLoRA); needs --lora_rank.")
    lora_rank: Int = flag(0, "Train an adapter of this rank beside frozen weights (LoRA); 0 trains all weights.", ge=0)
    lora_alpha: Int = flag(16, "LoRA scale: the adapter's output is multiplied by alpha / rank.", ge=1)
    target_modules: tuple[str, ...] = flag((ALL_LINEAR,), "Layers with an adapter, by the last part of their names.")
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


class VLLMSettings(Settings):
    """vLLM"""

    vllm_quantization: Literal["fp8"] | None = flag(None, "Type of weights and activations in vLLM's linear layers.")
    vllm_kv_cache_dtype: Literal["auto", "fp8"] = flag("auto", "Type of vLLM's key-value cache.")
    vllm_args: tuple[str, ...] | None = flag(
        None, "More arguments of vLLM's engine, as name=value by vLLM's own names, such as max_num_batched_tokens=8192."
    )
    vllm_cpu_kv_cache_gb: Positive = flag(1.0, "Size of the key-value cache on a CPU, in GB.")
    enforce_eager: bool = flag(False, "No compilation and no CUDA graphs in vLLM.")

    @property
    def rounding(self) -> tuple[str, ...]:
        """The flags that let engines compute in fewer bits than the trainer."""
        return tuple(self.changed("vllm_quantization", "vllm_kv_cache_dtype"))

    def engine_problems(self, engine: EngineName, chosen_by: str, *more: str) -> Iterator[str]:
        """vLLM's own flags, ``more`` among them, with another engine, which the flag ``chosen_by`` chose."""
        if engine is EngineName.TRANSFORMERS:
            for name in (*self.changed("enforce_eager", *more), *self.rounding, *self.changed("vllm_args")):
                yield f"{{{name}}} is vLLM's but {{{chosen_by}}} generates with Transformers: change one of them."


class TrainSettings(Settings):
    """Training"""

    train_batch_size: Count = flag(128, "Samples per optimizer step, over all workers.")
    micro_train_batch_size: Count | Literal["auto"] = flag(
        "auto", "At most this many samples per forward and backward; auto: as many as --max_tokens_per_gpu allows."
    )
    max_tokens_per_gpu: Count = flag(16384, "Token budget of one packed micro-batch on one worker.")
    packing_samples: bool = flag(True, "Pack sequences without padding; --no_packing_samples runs them one by one.")
    max_epochs: Count = flag(1, "Passes over the data (RL: over each rollout).")
    max_norm: FromZero = flag(1.0, "Clip the global gradient norm to this; 0 turns clipping off.")
    l2: FromZero = flag(0.0, "AdamW weight decay (not on biases and norm weights).")
    adam_betas: tuple[float, float] = flag((0.9, 0.95), "AdamW betas.")
    lr_scheduler: Scheduler = flag(Scheduler.COSINE_WITH_MIN_LR, "Learning-rate schedule, counted in optimizer steps.")
    lr_warmup_ratio: Share = flag(0.03, "Warm-up steps = ceil(ratio x total optimizer steps).")
    min_lr_ratio: Share = flag(0.1, "Lowest learning rate as a share of the peak, of schedules with a floor.")
    lr_num_cycles: Positive | None = flag(
        None, "Waves of a cosine (default: half a wave), or how often cosine_with_restarts falls (default: 1)."
    )
    lr_power: Positive = flag(1.0, "Exponent of --lr_scheduler polynomial.")
    lr_decay_ratio: Share = flag(0.1, "Steps of the fall in warmup_stable_decay = ceil(ratio x total steps).")
    lr_factor: float | None = flag(
        None,
        "What reduce_lr_on_plateau and greedy multiply the rate by when the held-out loss no longer falls "
        "(default: 0.1 and 0.95); greedy divides by it while the loss falls.",
        gt=0,
        lt=1,
    )
    lr_patience: Int = flag(10, "reduce_lr_on_plateau, greedy: change the rate after more such evaluations.", ge=0)
    max_lr_ratio: float = flag(10.0, "Highest rate of greedy as a multiple of the learning rate it starts from.", ge=1)
    seed: Seed = flag(42, "Seed of data order, sampling and initialisation.")
    full_determinism: bool = flag(
        False,
        "Deterministic kernels; a run repeats bit for bit on the same machine, but for log-probs that vLLM rounds by its batches.",
    )
    backend: BackendName = flag(BackendName.FSDP2, "Training backend.")
    zero_stage: Int = flag(2, "0 replicates; 1, 2 shard gradients and optimizer; 3 shards weights too.", ge=0, le=3)
    adam_offload: bool = flag(False, "Keep master weights and Adam's moments in host memory, and run AdamW there.")
    fsdp_shard_size: Int | None = flag(
        None,
        "FSDP2: shard within groups of this many workers, each with a copy of the model (HSDP); default: over all.",
        ge=2,
    )
    zpg: Count = flag(1, "ZeRO++: ranks that hold one more copy of the weights for the backward (DeepSpeed, stage 3).")
    grad_accum_dtype: GradAccumDtype = flag(
        GradAccumDtype.FP32,
        "In which numbers micro-batches are added up; bf16 is DeepSpeed's only and loses small terms.",
    )
    overlap_comm: bool = flag(False, "Overlap DeepSpeed's communication with the backward pass; FSDP2 always does.")
    deepcompile: bool = flag(False, "DeepSpeed's compiler. Refused: it cannot compile packed batches.")
    ring_attn_size: Count = flag(1, "Processes that share each batch, by its tokens (ring attention).")
    ring_head_stride: Count = flag(1, "Key/value heads exchanged per ring step, a divisor of their number.")
    ds_tensor_parallel_size: Count = flag(1, "Processes that share the weights of each layer (tensor parallelism).")
    local_rank: Int = later(-1, "Set by launchers of one process per device; this command starts its own workers.")


class OutputSettings(Settings):
    """Output"""

    run_dir: PathText | None = flag(None, "Folder of everything the run leaves behind; default runs/<command>-<time>.")
    save_path: PathText = flag("./ckpt", "Folder of the final model in Hugging Face format.")
    ckpt_path: PathText = flag("./ckpt/checkpoints", "Folder of resumable checkpoints.")
    save_steps: Int = flag(-1, "Write a checkpoint every N steps (RL: rollouts); -1 never.")
    save_hf_ckpt: bool = flag(False, "With each checkpoint also write the model in Hugging Face format.")
    disable_ds_ckpt: bool = flag(False, "Do not write the resumable part of checkpoints (needs --save_hf_ckpt).")
    max_ckpt_num: Count = flag(3, "Keep at most this many checkpoints; the newest is never removed.")
    max_ckpt_mem: Positive = flag(1e8, "Keep at most this many GB of checkpoints.")
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
    use_wandb: str | None = flag(None, "Weights & Biases: an API key, or any word with a login or WANDB_API_KEY.")
    wandb_org: str | None = flag(None, "Weights & Biases entity.")
    wandb_group: str | None = flag(None, "Weights & Biases group.")
    wandb_project: str = flag("togi", "Weights & Biases project.")
    wandb_run_name: str | None = flag(None, "Weights & Biases run name; default: the run folder's name.")
    use_tensorboard: PathText | None = flag(None, "TensorBoard folder.")

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether the run writes into ``--ckpt_path``: checkpoints, or its best model."""
        return self.save_steps > 0 or self.best_metric_key != NO_METRIC


# The settings that only another one reads, by that one.
READERS = {
    "gradient_checkpointing": ("gradient_checkpointing_use_reentrant", "gradient_checkpointing_above"),
    "lora_rank": ("lora_alpha", "lora_dropout", "target_modules"),
}


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
    if template is None:
        return
    if not applied:
        yield "--tokenizer_chat_template is only used with --apply_chat_template: add it, or leave the template out."
    if "{" not in template:
        yield f'--tokenizer_chat_template {template!r} is no Jinja template: give its text, in bash "$(cat FILE)".'
    if fault := _template_fault(template):
        yield f"--tokenizer_chat_template has a syntax error in {fault}: correct the template."


def _template_fault(template: str) -> str:
    """Line and reason of a Jinja syntax error; "" if there is none."""
    from jinja2 import Environment, TemplateSyntaxError

    # Transformers' own block, which marks answers, is no part of Jinja.
    text = re.sub(r"{%([-+]?)\s*(?:end)?generation\s*([-+]?)%}", "", template)
    try:
        Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno} ({(error.message or '').rstrip('.')})"
    return ""


def head_problems(prefix: str) -> Iterator[str]:
    """Faults of a ``--value_head_prefix``, the name of a new head."""
    if not prefix.isidentifier():
        yield f"--value_head_prefix {prefix!r} must be a plain name such as score."
    if prefix in MODEL_PARTS:
        yield "{value_head_prefix} is the name of another part of language models: choose one such as score."


def rendering_problems(c: PromptText) -> Iterator[str]:
    """Faults of the flags that format prompts."""
    if c.input_template is not None:
        yield from template_problems(c.input_template, applied=c.apply_chat_template)
    yield from chat_template_problems(c.tokenizer_chat_template, applied=c.apply_chat_template)


def check_mixture(path: str, kind: str) -> None:
    """Raise ConfigError for a model (of type ``kind``) without a router to balance."""
    if kind not in MIXTURES:
        raise ConfigError(
            f"--aux_loss_coef balances the experts of a mixture ({', '.join(MIXTURES)}), but --pretrain {path} is a {kind} model: "
            "leave it out."
        )


def model_problems(c: ModelSettings) -> Iterator[str]:
    """Faults of the model flags of any command."""
    if c.load_in_4bit and c.lora_rank == 0:
        yield "--load_in_4bit freezes the weights and trains an adapter: add --lora_rank, or leave --load_in_4bit out."
    yield from unread(c, READERS)
    if c.gradient_checkpointing_use_reentrant and c.gradient_checkpointing_above > 0:
        # The re-entrant kind needs the same layers on all workers.
        yield "--gradient_checkpointing_above is not for --gradient_checkpointing_use_reentrant: leave one of them out."
    if c.gradient_checkpointing_use_reentrant and c.aux_loss_coef > 0:
        # That kind hides the router from the loss.
        yield "--aux_loss_coef has no gradient with --gradient_checkpointing_use_reentrant: leave the second out."
    if ALL_LINEAR in c.target_modules and len(c.target_modules) > 1:
        yield f"{{target_modules}}: give {ALL_LINEAR} alone, or names without it."


def lora_dropout_problems(c: ModelSettings) -> Iterator[str]:
    """Dropout of an adapter whose logprobs are compared with a reference, or with its own earlier ones."""
    if c.lora_dropout > 0:
        yield (
            "{lora_dropout} would put noise into log-probs that are compared with those of a reference or of earlier weights: "
            "leave it out."
        )


def train_problems(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    """Faults of the training flags of any command. ``model``: the model flags of the same command."""
    if model.load_in_4bit and c.zero_stage == 3:
        yield "--load_in_4bit with --zero_stage 3: quantised weights are not sharded, use --zero_stage 0, 1 or 2."
    yield from _backend(c, model)
    if c.grad_accum_dtype is GradAccumDtype.BF16 and not model.bf16:
        yield "--grad_accum_dtype bf16 needs gradients in bfloat16, but --bf16 is off: turn it on, or leave the first out."
    if c.ring_head_stride > 1 and c.ring_attn_size == 1:
        yield "{ring_head_stride} is about a ring of processes: add --ring_attn_size, or leave it out."
    if not c.packing_samples and c.micro_train_batch_size not in ("auto", 1):
        yield "{micro_train_batch_size} needs packing but --no_packing_samples is set: leave one of them out."
    if not all(0 <= beta < 1 for beta in c.adam_betas):
        yield "{adam_betas} must both be at least 0 and below 1."
    yield from _schedule_problems(c)


def _backend(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    """What one of the backends cannot do, or only in some layouts."""
    on_deepspeed = c.backend is BackendName.DEEPSPEED
    if model.gradient_checkpointing_above > 0 and on_deepspeed and c.zero_stage == 3:
        # Workers would gather other layers, each by its own pack.
        yield "--gradient_checkpointing_above does not work with --backend deepspeed and --zero_stage 3: leave the first out."
    if c.deepcompile and not on_deepspeed:
        yield f"--deepcompile is DeepSpeed's compiler but --backend is {c.backend}: leave it out."
    if c.deepcompile:
        yield "--deepcompile needs one graph for all steps, but packed batches differ in their segment tables: leave it out."
    if c.fsdp_shard_size is not None and (on_deepspeed or c.zero_stage == 0):
        other = "{backend}" if on_deepspeed else "{zero_stage}"
        yield f"{{fsdp_shard_size}} needs --backend fsdp2 with --zero_stage 1, 2 or 3, not {other}: leave it out."
    if c.zpg > 1 and not (on_deepspeed and c.zero_stage == 3):
        yield f"{{zpg}} needs --backend deepspeed and --zero_stage 3, not {c.backend} and {c.zero_stage}: leave --zpg out."
    if c.grad_accum_dtype is GradAccumDtype.BF16 and (not on_deepspeed or c.zero_stage == 0 or model.load_in_4bit):
        # All else adds up in float32.
        yield "--grad_accum_dtype bf16 needs --backend deepspeed, --zero_stage 1 to 3 and no --load_in_4bit: leave it out."


def _schedule_problems(c: TrainSettings) -> Iterator[str]:
    kind = c.lr_scheduler
    decays = kind is Scheduler.WARMUP_STABLE_DECAY
    # Which schedules read each flag.
    used = {
        "min_lr_ratio": kind.follows_a_loss or kind.endswith("with_min_lr") or kind is Scheduler.POLYNOMIAL or decays,
        "lr_num_cycles": kind.startswith("cosine") or decays,
        "lr_power": kind is Scheduler.POLYNOMIAL,
        "lr_decay_ratio": decays,
        "lr_factor": kind.follows_a_loss,
        "lr_patience": kind.follows_a_loss,
        "max_lr_ratio": kind is Scheduler.GREEDY,
    }
    for name in c.changed(*used):
        if not used[name]:
            yield f"{{{name}}} has no effect with {{lr_scheduler}}: leave it out, or choose another schedule."
    if decays and c.lr_warmup_ratio + c.lr_decay_ratio > 1:
        yield "{lr_warmup_ratio} and {lr_decay_ratio} are more than the whole run: lower one of them."


def output_problems(c: OutputSettings, *, evaluates: bool) -> Iterator[str]:
    """Faults of the output flags of any command. ``evaluates``: there is a held-out set."""
    if c.best_metric_key != NO_METRIC and not evaluates:
        yield "{best_metric_key} is measured on held-out data: add --eval_dataset, or leave it out."
    if c.best_metric_key == NO_METRIC and c.best_metric_mode != "auto":
        yield "{best_metric_mode} says which values are good, but of no metric: add --best_metric_key."
    if c.save_hf_ckpt and c.save_steps <= 0:
        yield "--save_hf_ckpt writes with each checkpoint: set --save_steps to a positive number."
    if c.disable_ds_ckpt and not c.save_hf_ckpt:
        yield "--disable_ds_ckpt without --save_hf_ckpt leaves nothing to save: add the second or leave the first out."
    yield from unread(c, {"load_checkpoint": ("use_ds_universal_ckpt",)})
    if c.save_steps == 0:
        yield "--save_steps must be positive, or -1."


def parallel_problems(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    """What ``--torch_compile`` and ``--ds_tensor_parallel_size`` cannot be combined with."""
    is_split, shards_all = c.ds_tensor_parallel_size > 1, c.backend is BackendName.DEEPSPEED and c.zero_stage == 3
    compiled = (
        (model.use_liger_kernel, "--use_liger_kernel: both compute the layers"),
        (model.load_in_4bit, "--load_in_4bit: weights in NF4 are not compiled"),
        (model.aux_loss_coef > 0, "{aux_loss_coef}: experts are not compiled"),
        (shards_all, "--backend deepspeed and --zero_stage 3: weights would be gathered inside of what is compiled"),
        (is_split, "{ds_tensor_parallel_size}: split weights are not compiled"),
    )
    # Tensor parallelism is built on FSDP2's shards of plain weights.
    split = (
        (c.ring_attn_size > 1, "{ring_attn_size}: both part a batch's work among the same processes"),
        (c.backend is not BackendName.FSDP2, "{backend}: weights are split beneath --backend fsdp2"),
        (model.lora_rank > 0, "{lora_rank}: adapters are not split"),
        (model.aux_loss_coef > 0, "{aux_loss_coef}: experts are not split"),
        (model.use_liger_kernel, "--use_liger_kernel: Liger's kernels take whole weights"),
        (c.adam_offload, "--adam_offload: that is not supported yet"),
        (c.fsdp_shard_size is not None, "{fsdp_shard_size}: split weights are sharded over all groups"),
    )
    tensor = "{ds_tensor_parallel_size}"
    for name, is_on, others in (("--torch_compile", model.torch_compile, compiled), (tensor, is_split, split)):
        yield from (f"{name} with {other}, leave one of them out." for is_so, other in others if is_on and is_so)
    if is_split and c.zero_stage == 0:
        yield f"{tensor} with {{zero_stage}}, which keeps every weight whole: use --zero_stage 1, 2 or 3."


def check_splittable(size: int, flag: str, path: str, settings: Mapping[str, object]) -> None:
    """Raise ConfigError if the layers of a model, by its config.json, cannot be split in ``size`` equal parts."""
    if size == 1 or not settings:
        return
    kind = settings.get("model_type")
    if kind not in SPLITTABLE:
        raise ConfigError(
            f"--ds_tensor_parallel_size {size} can split {', '.join(SPLITTABLE)} models, but --{flag} {path} is a {kind} model: "
            "leave it out."
        )
    # Query heads, key/value heads and the hidden units of the MLP are all split.
    heads = settings.get("num_attention_heads")
    groups, hidden = settings.get("num_key_value_heads", heads), settings.get("intermediate_size")
    if any(isinstance(number, int) and number % size != 0 for number in (heads, groups, hidden)):
        raise ConfigError(
            f"--ds_tensor_parallel_size {size} does not divide the {heads} heads, the {groups} key/value heads or the {hidden} "
            f"hidden units of --{flag} {path}: choose a divisor of all three."
        )
