"""The settings of ``togi infer`` (established name: ``batch_inference``) and ``togi chat``, and the contradictions between them.

``togi infer`` generates to a file, or scores a file.
"""

import os
from collections.abc import Iterator
from typing import Literal

from togi.config.choices import EngineName, EvalTask, PostProcessor
from togi.config.fields import Count, FromZero, Int, PathText, Positive, Seed, Settings, flag, missing, refuse
from togi.config.parse import Parsed
from togi.config.shared import (
    DISABLE_FAST_TOKENIZER,
    PLAIN_TEMPLATE,
    ROWS,
    VLLMSettings,
    rendering_problems,
    template_problems,
)

REWARD_TEMPLATE = "{input} <rm_score>: {reward} "
CSFT_PROMPT = "<rm_score>: 5.00"


class RewardTextSettings(Settings):
    """Conditional SFT"""

    reward_template: str = flag(REWARD_TEMPLATE, "How a reward is told: text with {input} and {reward} once each.")
    csft_prompt: str = flag(CSFT_PROMPT, "The reward to ask for, in the words of --reward_template, or the number.")


class GenerationSettings(VLLMSettings):
    """Generation"""

    max_new_tokens: Count = flag(1024, "At most this many new tokens per output.")
    prompt_max_len: Count = flag(1024, "Prompts of more tokens are left out and counted, never cut.")
    temperature: FromZero = flag(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = flag(1.0, "Nucleus sampling.", gt=0, le=1)
    greedy_sampling: bool = flag(False, "Take the most likely token each time, in both engines.")
    repetition_penalty: Positive = flag(1.0, "Divide positive logits of tokens already there, multiply negative ones.")
    max_num_seqs: Count = flag(256, "At most this many outputs in progress in vLLM.")
    enable_prefix_caching: bool = flag(True, "vLLM prefix cache, from which outputs take what their prompts share.")
    vllm_gpu_memory_utilization: float = flag(0.9, "Share of a GPU's memory that vLLM may take.", gt=0, le=1)
    tp_size: Count = flag(1, "Processes that share the model in vLLM, one on each GPU (tensor parallelism).")

    @property
    def sampling_temperature(self) -> float:
        return 0.0 if self.greedy_sampling else self.temperature

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the engine must hold."""
        return self.prompt_max_len + self.max_new_tokens

    @property
    def asked_context(self) -> str:
        """The flags that determine the longest sequence, for messages."""
        return f"--prompt_max_len {self.prompt_max_len} + --max_new_tokens {self.max_new_tokens}"


class SliceSettings(Settings):
    """Outputs"""

    best_of_n: Count = flag(1, "Outputs per prompt.")
    iter: Int | None = flag(None, "Take only slice number ITER (from 0) of --rollout_batch_size prompts.", ge=0)
    rollout_batch_size: Count = flag(2048, "Prompts of a slice.")
    enable_csft: bool = flag(False, "Put the reward text of --csft_prompt into every prompt.")
    label_key: str | None = flag(None, "Copy this field of each prompt into the rows as label.")
    keep_special_tokens: bool = flag(False, "Leave special tokens in the output, the end token among them.")
    keep_tokens: bool = flag(False, "Write the token ids of each output into the rows too, as output_tokens.")


class ScoringSettings(Settings):
    """Scoring"""

    output_key: str = flag("output", "Field with the output to score.")
    max_len: Count = flag(2048, "At most this many tokens per row, prompt and output together.")
    value_head_prefix: str = flag("score", "Name of the scalar head; a model's own config wins.")
    normalize_reward: bool = flag(False, "Standardise with the mean and std of the model, in csft of the rows.")
    post_processor: PostProcessor | Literal["null", "None"] | None = flag(
        None, "What becomes of scored rows: the best of each prompt, reward text, or pairs; default: all are kept."
    )
    max_tokens_per_gpu: Count = flag(16384, "Token budget of one packed forward.")


class InferModelSettings(Settings):
    """Model"""

    eval_task: EvalTask | None = flag(None, "generate_vllm, generate (Transformers) or rm (reward model). Required.")
    pretrain: PathText = flag("", "Model folder or hub name. Required.")
    bf16: bool = flag(False, "Run in bfloat16. Default: on GPUs that have it.")
    flash_attn: bool = flag(True, "Of reward models: PyTorch's FlashAttention where it computes (CUDA in bfloat16).")
    micro_batch_size: Count = flag(16, "Outputs in progress in Transformers; rows of one forward in scoring.")
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
    seed: Seed = flag(1234, "Seed; every output has one of its own, made from this, its prompt's place and its number.")
    full_determinism: bool = flag(False, "Deterministic kernels.")
    local_rank: Int = flag(-1, "Set by launchers; this command runs in one process.")
    zero_stage: Int = flag(0, "Accepted for established commands; changes nothing: there is one process.", ge=0, le=3)
    disable_fast_tokenizer: bool = DISABLE_FAST_TOKENIZER
    use_ms: bool = flag(False, "Take names of models and data sets from ModelScope instead of the Hugging Face hub.")


class RowSettings(Settings):
    """Data"""

    dataset: PathText = flag("", "Prompts or scored rows: files, folders or hub names, or name@dir. Required.")
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


class TalkSettings(Settings):
    """Chat"""

    pretrain: PathText = flag("", "Model folder or hub name. Required.")
    bf16: bool = flag(False, "Run in bfloat16. Default: on GPUs that have it.")
    max_len: Count = flag(1024, "At most this many new tokens per answer.")
    temperature: FromZero = flag(0.2, "Sampling temperature; 0 is greedy.")
    top_p: float = flag(0.9, "Nucleus sampling.", gt=0, le=1)
    greedy_sampling: bool = flag(False, "Take the most likely token each time.")
    repetition_penalty: Positive = flag(1.0, "Make tokens that are already there less likely; 1 changes nothing.")
    apply_chat_template: bool = flag(True, "Talk in the chat template; --no_apply_chat_template: one plain text.")
    input_template: str | None = flag(PLAIN_TEMPLATE, "Format string with one {} around each message, in plain text.")
    tools: PathText | None = flag(None, "JSON file of tools that the chat template shows, as in a row's field tools.")
    ta_prompt: PathText | None = flag(None, "Text file that the conversation starts with, in plain text only.")
    enable_csft: bool = flag(False, "Put the reward text of --csft_prompt before each answer.")
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
    flash_attn: bool = flag(
        True, "Accepted for established commands; changes nothing: SDPA takes PyTorch's FlashAttention on CUDA."
    )
    load_in_4bit: bool = flag(False, "Hold the weights in NF4.")
    disable_fast_tokenizer: bool = DISABLE_FAST_TOKENIZER
    use_ms: bool = flag(False, "Take names of models and data sets from ModelScope instead of the Hugging Face hub.")


class ChatConfig(TalkSettings, RewardTextSettings):
    """Talk to a model in the terminal. "clear" starts anew, "exit" ends."""


OF_VLLM = ("vllm_gpu_memory_utilization", "max_num_seqs", "enable_prefix_caching")
GENERATING = (*GenerationSettings.model_fields, *SliceSettings.model_fields)
SCORING = tuple(ScoringSettings.model_fields)


def check_infer(parsed: Parsed[InferConfig]) -> None:
    """Raise ConfigError with the first contradiction. Each message names the flags and the remedy."""
    refuse(parsed.config, _problems(parsed.config, parsed.given))


def _problems(c: InferConfig, given: set[str]) -> Iterator[str]:
    # Required flags, flags of the other task, then the flags of this one.
    yield from missing(
        c,
        eval_task="generate_vllm, generate (Transformers engine), or rm (score with a reward model)",
        pretrain="the Hugging Face folder or hub name of the model to run",
        dataset=ROWS,
        output_path="the JSONL file to write",
    )
    if not c.output_path.endswith((".jsonl", ".json")):
        yield "{output_path} must end in .jsonl: the file has one object a line."
    names, other = (GENERATING, "rm scores") if c.eval_task is EvalTask.RM else (SCORING, f"{c.eval_task} generates")
    for name in names:
        if name in given:
            yield f"--{name} has no meaning here, --eval_task {other}: leave it out."
    yield from rendering_problems(c)
    yield from reward_template_problems(c.reward_template)
    yield from (_scoring if c.eval_task is EvalTask.RM else _generation)(c, given)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        size = os.environ["WORLD_SIZE"]
        yield f"WORLD_SIZE is {size}, but {{eval_task}} runs in one process: start it with plain python, on parts (--iter)."


def _generation(c: InferConfig, given: set[str]) -> Iterator[str]:
    yield from sampling_problems(c, c.best_of_n, given)
    yield from c.engine_problems(c.engine, "eval_task", "tp_size", *OF_VLLM)
    if c.iter is None and "rollout_batch_size" in given:
        yield "--rollout_batch_size is the size of the slices of --iter, which is not set: add it or leave the first out."
    yield from _csft_problems(c, given)


def _scoring(c: InferConfig, given: set[str]) -> Iterator[str]:
    if "csft_prompt" in given:
        yield "--csft_prompt asks for a reward in generation, --eval_task rm measures it: leave it out."
    if "reward_template" in given and c.selection is not PostProcessor.CSFT:
        yield "--reward_template is only used with --post_processor csft: add it, or leave the first out."
    if c.max_tokens_per_gpu < c.max_len:
        yield "{max_tokens_per_gpu} is less than {max_len}: raise the first."


def check_chat(parsed: Parsed[ChatConfig]) -> None:
    """Like ``check_infer``, for ``togi chat``."""
    refuse(parsed.config, _chat_problems(parsed.config, parsed.given))


def _chat_problems(c: ChatConfig, given: set[str]) -> Iterator[str]:
    yield from missing(c, pretrain="the folder or hub name of the model to talk to")
    # Flags for plain text, then flags for chats.
    for name in ("input_template", "ta_prompt"):
        if c.apply_chat_template and name in given:
            yield f"--{name} is for plain text: add --no_apply_chat_template, or leave --{name} out."
    if not c.apply_chat_template:
        for name in c.changed("tools", "tokenizer_chat_template"):
            yield f"--{name} and --no_apply_chat_template exclude each other: leave one of them out."
        if c.input_template is not None:
            yield from template_problems(c.input_template, applied=False)
    yield from greedy_problems(c, given)
    yield from reward_template_problems(c.reward_template)
    yield from _csft_problems(c, given)


def _csft_problems(c: InferConfig | ChatConfig, given: set[str]) -> Iterator[str]:
    for name in ("csft_prompt", "reward_template"):
        if name in given and not c.enable_csft:
            yield f"--{name} is only used with --enable_csft: add it, or leave the first out."


def reward_template_problems(template: str) -> Iterator[str]:
    """Faults of a ``--reward_template``."""
    if template.count("{input}") != 1 or template.count("{reward}") != 1:
        yield f"--reward_template must contain {{input}} and {{reward}} exactly once each, but is {template!r}."


def greedy_problems(c: GenerationSettings | ChatConfig, given: set[str]) -> Iterator[str]:
    """A temperature beside ``--greedy_sampling``."""
    if c.greedy_sampling and "temperature" in given and c.temperature > 0:
        yield "--greedy_sampling takes the most likely token but --temperature draws one: leave one of them out."


def sampling_problems(c: GenerationSettings, samples: int, given: set[str]) -> Iterator[str]:
    """Faults of the sampling flags. ``samples``: outputs per prompt (``--best_of_n``)."""
    yield from greedy_problems(c, given)
    if samples > 1 and c.sampling_temperature == 0:
        which = "--greedy_sampling" if c.greedy_sampling else "--temperature 0"
        yield f"{{best_of_n}} with {which} would give the same output {samples} times: leave one of them out."
