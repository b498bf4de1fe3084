"""The settings of ``togi infer`` (established name: ``batch_inference``): generation to a file, scoring of a file."""

from __future__ import annotations

from typing import Literal

from togi.config.choices import EngineName, EvalTask, PostProcessor
from togi.config.fields import Count, Int, PathText, Settings, flag

REWARD_TEMPLATE = "{input} <rm_score>: {reward} "
CSFT_PROMPT = "<rm_score>: 5.00"


class RewardTextSettings(Settings):
    """Conditional SFT"""

    reward_template: str = flag(
        REWARD_TEMPLATE, "How a reward is told to the model: text with {input} and {reward} once each."
    )
    csft_prompt: str = flag(
        CSFT_PROMPT, "The reward to ask for, in the words of --reward_template, or the number alone."
    )


class GenerationSettings(Settings):
    """Generation"""

    max_new_tokens: Count = flag(1024, "At most this many new tokens per output.")
    prompt_max_len: Count = flag(1024, "Prompts of more tokens are left out and counted, never cut.")
    temperature: float = flag(1.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = flag(1.0, "Nucleus sampling.", gt=0, le=1)
    greedy_sampling: bool = flag(False, "Take the most likely token each time, in both engines.")
    repetition_penalty: float = flag(
        1.0, "Divide positive logits of tokens already there by this, multiply negative ones.", gt=0
    )
    max_num_seqs: Count = flag(256, "At most this many outputs in progress in vLLM.")
    enable_prefix_caching: bool = flag(True, "vLLM prefix cache, from which outputs take what their prompts share.")
    enforce_eager: bool = flag(False, "No compilation and no CUDA graphs in vLLM.")
    vllm_gpu_memory_utilization: float = flag(0.9, "Share of a GPU's memory that vLLM may take.", gt=0, le=1)
    vllm_cpu_kv_cache_gb: float = flag(1.0, "Size of the key-value cache on a CPU, in GB.", gt=0)
    tp_size: Count = flag(1, "Processes that share the model in vLLM, one on each GPU (tensor parallelism).")


class SliceSettings(Settings):
    """Outputs"""

    best_of_n: Count = flag(1, "Outputs per prompt.")
    iter: Int | None = flag(None, "Take only slice number ITER (from 0) of --rollout_batch_size prompts.", ge=0)
    rollout_batch_size: Count = flag(2048, "Prompts of a slice.")
    enable_csft: bool = flag(False, "Put the reward text of --csft_prompt into every prompt.")
    label_key: str | None = flag(None, "Copy this field of each prompt into the rows as label.")
    keep_special_tokens: bool = flag(False, "Leave special tokens in the output, the end token among them.")


class ScoringSettings(Settings):
    """Scoring"""

    output_key: str = flag("output", "Field with the output to score.")
    max_len: Count = flag(2048, "At most this many tokens per row, prompt and output together.")
    value_head_prefix: str = flag("score", "Name of the scalar head; a model's own config wins.")
    normalize_reward: bool = flag(
        False, "Standardise with the mean and std of the model's config; for --post_processor csft with the rows' own."
    )
    post_processor: PostProcessor | Literal["null", "None"] | None = flag(
        None, "What becomes of scored rows: the best of each prompt, reward text, or pairs; default: all are kept."
    )
    max_tokens_per_gpu: Count = flag(16384, "Token budget of one packed forward.")


class InferModelSettings(Settings):
    """Model"""

    eval_task: EvalTask | None = flag(
        None, "generate_vllm, generate (Transformers engine, nothing to install) or rm (reward model). Required."
    )
    pretrain: PathText = flag("", "Model folder or hub name. Required.")
    bf16: bool = flag(False, "Run in bfloat16.")
    flash_attn: bool = flag(False, "Use FlashAttention where the device has it (CUDA); vLLM and SDPA need no flag.")
    micro_batch_size: Count = flag(16, "Outputs in progress in Transformers; rows of one forward in scoring.")
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
    seed: Int = flag(1234, "Seed; every output has one of its own, made from this, its prompt's place and its number.")
    full_determinism: bool = flag(False, "Deterministic kernels.")
    local_rank: Int = flag(-1, "Set by launchers; this command runs in one process.")
    zero_stage: Int = flag(
        0, "Accepted for established commands; changes nothing: one process has nothing to shard.", ge=0, le=3
    )
    disable_fast_tokenizer: bool = flag(
        False, "Accepted for established commands; changes nothing: Transformers has one tokenizer for each model."
    )
    use_ms: bool = flag(False, "Take names of models and data sets from ModelScope instead of the Hugging Face hub.")


class RowSettings(Settings):
    """Data"""

    dataset: PathText = flag(
        "", "Prompts or scored rows: comma-separated files, folders or hub names, each optionally name@dir. Required."
    )
    dataset_probs: str | None = flag(None, "Comma-separated sampling probabilities, one per set; default: concatenate.")
    dataset_split: str = flag("train", "Split of the sets.")
    max_samples: Count = flag(100_000_000, "Use at most this many rows of the mixture.")
    input_key: str = flag("input", "Field with the prompt: a string or a list of chat messages.")
    apply_chat_template: bool = flag(False, "Render prompts with the tokenizer's chat template.")
    input_template: str | None = flag(None, "Format string with one {} around the prompt, without a chat template.")
    output_path: PathText = flag("", "JSONL file to write. Required.")


class InferConfig(
    InferModelSettings, RowSettings, GenerationSettings, SliceSettings, ScoringSettings, RewardTextSettings
):
    """Generate outputs for a file of prompts, or score a file of outputs. A killed command goes on when it is given again."""

    @property
    def engine(self) -> EngineName:
        return EngineName.VLLM if self.eval_task is EvalTask.GENERATE_VLLM else EngineName.TRANSFORMERS

    @property
    def selection(self) -> PostProcessor | None:
        """The post-processor; the established interface writes none as null."""
        return self.post_processor if isinstance(self.post_processor, PostProcessor) else None

    @property
    def sampling_temperature(self) -> float:
        return 0.0 if self.greedy_sampling else self.temperature

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the engine must hold."""
        return self.prompt_max_len + self.max_new_tokens
