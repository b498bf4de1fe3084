"""The settings of ``togi sft | rm | dpo | kto | prm | kd`` (established names: ``train_sft``, ``train_rm``, ...).

One class a command. ``OfflineConfig`` is what all of them have and what the one loop (``togi.run.offline``) reads.
"""

from __future__ import annotations

from togi.config.choices import Divergence, EngineName, Overlong, RewardLoss
from togi.config.fields import Count, CountOrAuto, Int, PathText, Settings, flag
from togi.config.shared import ModelSettings, OutputSettings, TrainSettings

PLAIN_TEMPLATE = "User: {}\nAssistant: "


class DatasetSettings(Settings):
    """Data"""

    dataset: PathText = flag(
        "", "Training sets: comma-separated files, folders or hub names, each optionally name@dir. Required."
    )
    dataset_probs: str | None = flag(None, "Comma-separated sampling probabilities, one per set; default: concatenate.")
    dataset_split: str = flag("train", "Split of the training sets.")
    max_samples: Count = flag(100_000_000, "Use at most this many rows of the mixture.")
    max_len: Count = flag(2048, "At most this many tokens per sequence, prompt and response together.")
    overlong: Overlong = flag(
        Overlong.DROP, "What becomes of longer rows: left out and counted, cut (without an end token), or an error."
    )
    max_bad_rows: float = flag(
        0.05,
        "Stop before training if a larger share of the rows is faulty; 0 stops at any. They are left out.",
        ge=0,
        le=1,
    )
    dataset_num_proc: CountOrAuto = flag(
        "auto", "Processes that tokenise the rows; auto: one per core for large sets, else this one."
    )


class EvaluationSettings(Settings):
    """Evaluation"""

    eval_dataset: PathText | None = flag(None, "Held-out sets, with the same fields as --dataset.")
    eval_split: str = flag("test", "Split of the held-out sets.")
    eval_steps: Int = flag(-1, "Evaluate every N optimizer steps; in any case at the end of each epoch.")
    eval_at_start: bool = flag(False, "Also evaluate before the first update.")


class LaunchSettings(Settings):
    """Launch"""

    local_rank: Int = flag(-1, "Set by launchers that start one process per device; wins over LOCAL_RANK.")


class OfflineConfig(LaunchSettings, ModelSettings, DatasetSettings, TrainSettings, EvaluationSettings, OutputSettings):
    """Training on a fixed data set."""

    learning_rate: float = flag(5e-6, "Peak learning rate.", ge=0)

    @property
    def split(self) -> str:
        """The split of the training sets."""
        return self.dataset_split


class PromptResponseSettings(Settings):
    """Rows"""

    input_key: str = flag("input", "Field with the prompt: a string or a list of chat messages.")
    output_key: str | None = flag(
        None, "Field with the response; default: the last message of the chat list in --input_key."
    )
    apply_chat_template: bool = flag(False, "Render rows with the tokenizer's chat template.")
    input_template: str | None = flag(
        PLAIN_TEMPLATE, "Format string with one {} around the prompt; not used with --apply_chat_template."
    )


class PairSettings(Settings):
    """Rows"""

    prompt_key: str | None = flag(None, "Field with the prompt; default: it is part of both conversations.")
    chosen_key: str = flag("chosen", "Field with the preferred response or conversation.")
    rejected_key: str = flag("rejected", "Field with the rejected response or conversation.")
    apply_chat_template: bool = flag(False, "Render rows with the tokenizer's chat template.")
    input_template: str | None = flag(None, "Format string with one {} around the prompt, without a chat template.")


class PretrainSettings(Settings):
    """Continued pre-training"""

    pretrain_mode: bool = flag(False, "Plain text in --input_key: no template, no end token, every token in the loss.")


class SFTConfig(PromptResponseSettings, PretrainSettings, OfflineConfig):
    """Supervised fine-tuning."""

    multiturn: bool = flag(False, "Learn every assistant turn of a chat list; needs --apply_chat_template.")
    train_split: str | None = flag(None, "Established name of --dataset_split.")
    max_epochs: Count = flag(2, "Passes over the data.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_sft", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_sft", "Weights & Biases project.")

    @property
    def split(self) -> str:
        """The split of the training sets, under whichever of its two names it was given."""
        return self.train_split if self.train_split is not None else self.dataset_split


class RMConfig(PairSettings, OfflineConfig):
    """Reward model from preference pairs."""

    loss: RewardLoss = flag(RewardLoss.SIGMOID, "Pairwise loss; log-exp is the same function without a margin.")
    margin_loss: bool = flag(False, "Subtract the field margin of each row inside the sigmoid loss.")
    compute_fp32_loss: bool = flag(False, "Compute the loss from float32 scores. Always so here, with or without.")
    value_head_prefix: str = flag("score", "Name of the scalar head; score loads in plain Transformers.")
    learning_rate: float = flag(9e-6, "Peak learning rate.", ge=0)
    max_len: Count = flag(512, "At most this many tokens per sequence, prompt and response together.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_rm", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_rm", "Weights & Biases project.")


class ReferenceSettings(Settings):
    """Reference model"""

    ref_offload: bool = flag(False, "Keep the frozen reference in host memory, on the device only while it scores.")
    precompute_ref: bool = flag(
        False, "Score all rows with the reference once, ahead of training, then free it (dpo only)."
    )


class DPOConfig(PairSettings, ReferenceSettings, OfflineConfig):
    """Direct preference optimisation: DPO, cDPO (--label_smoothing), IPO (--ipo)."""

    beta: float = flag(0.1, "Temperature: how strongly the policy is held to the reference.", gt=0)
    ipo: bool = flag(False, "IPO's squared loss in place of DPO's log-sigmoid.")
    label_smoothing: float = flag(0.0, "cDPO: the share of labels taken to be wrong.", ge=0, lt=0.5)
    nll_loss_coef: float = flag(0.0, "Weight of the chosen response's negative log-likelihood a token.", ge=0)
    ref_pretrain: PathText | None = flag(None, "Reference model; default: --pretrain.")
    learning_rate: float = flag(1e-5, "Peak learning rate.", ge=0)
    max_len: Count = flag(512, "At most this many tokens per sequence, prompt and response together.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_dpo", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_dpo", "Weights & Biases project.")


class KTOConfig(PromptResponseSettings, ReferenceSettings, OfflineConfig):
    """Kahneman-Tversky optimisation on single responses labelled desirable (1) or undesirable (0)."""

    label_key: str = flag("label", "Field with the label: 1 desirable, 0 undesirable.")
    beta: float = flag(0.01, "Temperature: how strongly the policy is held to the reference.", gt=0)
    desirable_loss_weight: float = flag(1.0, "Weight of desirable rows.", ge=0)
    undesirable_loss_weight: float = flag(1.0, "Weight of undesirable rows.", ge=0)
    ref_pretrain: PathText | None = flag(None, "Reference model; default: --pretrain.")
    learning_rate: float = flag(1e-5, "Peak learning rate.", ge=0)
    ckpt_path: PathText = flag("./ckpt/checkpoints_kto", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_kto", "Weights & Biases project.")


class PRMConfig(OfflineConfig):
    """Process reward model: a label at each placeholder token."""

    input_key: str = flag("input", "Field with the text, which has the placeholder after every step.")
    label_key: str = flag("label", "Field with one label a placeholder: tokens, or probabilities of the positive one.")
    placeholder_token: str = flag("", "The step marker: exactly one token. Required.")
    reward_tokens: tuple[str, ...] | None = flag(
        None, "Label tokens, one token each; soft labels need two, the positive one first. Default: the vocabulary."
    )
    learning_rate: float = flag(1e-6, "Peak learning rate.", ge=0)
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_prm", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_prm", "Weights & Biases project.")


class OnPolicySettings(Settings):
    """On-policy distillation"""

    on_policy_share: float = flag(
        0.0, "Share of the rows that the student answers itself; there the divergence alone is learned.", ge=0, le=1
    )
    generate_max_len: Count = flag(1024, "At most this many new tokens per response, within --max_len.")
    temperature: float = flag(
        1.0, "Sampling temperature; the divergence is always that of the models as they are.", gt=0
    )
    rollout_engine: EngineName = flag(EngineName.VLLM, "What generates: vLLM, or Transformers (no extra install).")
    vllm_gpu_memory_utilization: float = flag(
        0.3, "Share of a GPU's memory that vLLM may take, beside the models.", gt=0, le=1
    )
    vllm_cpu_kv_cache_gb: float = flag(1.0, "Size of the key-value cache on a CPU, in GB.", gt=0)
    enforce_eager: bool = flag(False, "No compilation and no CUDA graphs in vLLM.")


class KDConfig(PromptResponseSettings, PretrainSettings, OnPolicySettings, OfflineConfig):
    """Knowledge distillation from a frozen teacher."""

    output_key: str | None = flag("output", "Field with the response.")
    teacher_model: PathText = flag("", "Teacher: a Hugging Face folder or hub name. Required.")
    kd_coef: float = flag(0.4, "Share of the distillation loss; the rest is cross-entropy on the data.", ge=0, le=1)
    kd_divergence: Divergence = flag(
        Divergence.FORWARD,
        "forward: the student covers all the teacher may say; reverse: it says only what the teacher may.",
    )
    teacher_offload: bool = flag(False, "Keep the teacher in host memory, on the device only for its pass.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_kd", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_kd", "Weights & Biases project.")


PROMPTED = SFTConfig | KTOConfig | KDConfig
"""Commands whose rows are a prompt and a response."""
PAIRED = RMConfig | DPOConfig
"""Commands whose rows are two responses to one prompt."""
