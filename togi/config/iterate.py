"""The settings of ``togi iterate`` and their contradictions: rounds of generate, score, select, train.

Established as three shell loops.
"""

from collections.abc import Iterator
from typing import Literal

from togi.config import infer
from togi.config.choices import EngineName, IterateMethod
from togi.config.fields import Count, FromZero, Int, PathText, Positive, Settings, Share, flag, missing, refuse
from togi.config.parse import Parsed
from togi.config.rl import PromptSettings, RewardSettings
from togi.config.rl_checks import combination_problems, reward_problems
from togi.config.shared import MODEL_TO_TRAIN, ROWS, TrainSettings, rendering_problems

LEARNING_RATES = {IterateMethod.RS: 2e-6, IterateMethod.DPO: 5e-7, IterateMethod.CSFT: 2e-6}


class LoopSettings(Settings):
    """Rounds"""

    method: IterateMethod | None = flag(
        None,
        "rs: learn the best output; dpo: prefer the best to the worst; csft: learn all with their reward. Required.",
    )
    rounds: Count = flag(3, "Rounds of generate, score, select and train.")
    rollout_batch_size: Count = flag(1024, "Prompts per round, in the order of the data, which then starts again.")
    best_of_n: Count = flag(4, "Outputs per prompt.")
    keep_truncated: bool = flag(False, "Also learn outputs cut by --max_new_tokens, with an end token they never had.")
    rollout_engine: EngineName = flag(EngineName.VLLM, "What generates: vLLM, or Transformers (no extra install).")
    run_dir: PathText = flag("", "Folder of all rounds; the same command goes on there. Required.")


class LoopModelSettings(Settings):
    """Model"""

    pretrain: PathText = flag("", "Model to start from: a Hugging Face folder or hub name. Required.")
    bf16: bool = flag(False, "Compute in bfloat16; the master weights stay float32. Default: on GPUs that have it.")
    flash_attn: bool = flag(True, "PyTorch's FlashAttention where it computes (CUDA in bfloat16).")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")


class HeldOutSettings(Settings):
    """Evaluation"""

    eval_dataset: PathText | None = flag(
        None, "Held-out prompt sets, with the same keys as --prompt_data: scored before training and after each round."
    )
    eval_split: str = flag("train", "Split of the held-out sets.")
    eval_temperature: FromZero = flag(0.6, "Sampling temperature in evaluation; 0 is greedy.")
    eval_n_samples_per_prompt: Count = flag(4, "Outputs per prompt in evaluation.")


class PreferenceSettings(Settings):
    """Training on pairs"""

    beta: Positive = flag(0.1, "Temperature: how strongly the policy is held to the reference.")
    ipo: bool = flag(False, "IPO's squared loss in place of DPO's log-sigmoid.")
    label_smoothing: float = flag(0.0, "cDPO: the share of labels taken to be wrong.", ge=0, lt=0.5)
    nll_loss_coef: FromZero = flag(0.0, "Weight of the chosen response's negative log-likelihood a token.")
    ref_previous_round: bool = flag(False, "The reference is the model of the previous round; default: --pretrain.")


class IterateConfig(
    LoopSettings,
    LoopModelSettings,
    PromptSettings,
    RewardSettings,
    infer.RewardTextSettings,
    infer.GenerationSettings,
    TrainSettings,
    PreferenceSettings,
    HeldOutSettings,
):
    """Rounds of best-of-n: generate, score, select, train. A stopped command goes on when it is given again."""

    learning_rate: float | Literal["auto"] = flag("auto", "Peak learning rate; auto: 5e-7 for dpo, else 2e-6.")
    lr_warmup_ratio: Share = flag(0.0, "Warm-up steps = ceil(ratio x steps of a round); the first learns nothing.")
    max_len: Count = flag(2048, "At most this many tokens per row in training; longer rows are dropped and counted.")
    save_steps: Int = flag(-1, "In training write a checkpoint every N optimizer steps to go on from; -1 never.")

    @property
    def peak_learning_rate(self) -> float:
        assert self.method is not None
        return LEARNING_RATES[self.method] if self.learning_rate == "auto" else self.learning_rate


def check_iterate(parsed: Parsed[IterateConfig]) -> None:
    """Raise ConfigError with the first contradiction. Training flags are checked by the training command."""
    refuse(parsed.config, _problems(parsed.config, parsed.given))


def _problems(c: IterateConfig, given: set[str]) -> Iterator[str]:
    yield from missing(
        c,
        method="rs (rejection sampling), dpo (iterative DPO) or csft (conditional SFT)",
        pretrain=MODEL_TO_TRAIN,
        prompt_data=ROWS,
        run_dir="the folder of all rounds, in which the same command goes on after a stop",
    )
    yield from rendering_problems(c)
    yield from _reward(c)
    yield from _method(c, given)
    yield from infer.sampling_problems(c, c.best_of_n, given)
    yield from c.engine_problems(
        c.rollout_engine, "rollout_engine", "tp_size", "vllm_gpu_memory_utilization", "enable_prefix_caching"
    )
    if c.ds_tensor_parallel_size > 1:
        yield "--ds_tensor_parallel_size needs several processes, but togi iterate trains in one: leave it out."
    if c.fsdp_shard_size is not None:
        yield "--fsdp_shard_size needs several processes, but togi iterate trains in one: leave it out."
    if c.ring_attn_size > 1 or c.ring_head_stride > 1:
        yield "--ring_attn_size and --ring_head_stride need several processes, but togi iterate trains in one: leave them out."
    if c.eval_dataset is not None and c.eval_temperature == 0 and c.eval_n_samples_per_prompt > 1:
        yield "{eval_n_samples_per_prompt} with {eval_temperature} would repeat one output: set the first to 1."


def _reward(c: IterateConfig) -> Iterator[str]:
    yield from reward_problems(c)
    yield from combination_problems(c)
    # A reward model reads an output that was cut off with an end token behind it.
    if c.reward_models and c.max_tokens_per_gpu <= c.context_length:
        yield "{max_tokens_per_gpu} is not more than {prompt_max_len} + {max_new_tokens}, which a reward model reads: raise it."
    if c.normalize_reward and not c.reward_models and c.method is not IterateMethod.CSFT:
        yield "--normalize_reward works on a reward model, or on the text of --method csft: leave it out."


def _method(c: IterateConfig, given: set[str]) -> Iterator[str]:
    """Flags that belong to another method."""
    for names, owner in ((infer.RewardTextSettings, IterateMethod.CSFT), (PreferenceSettings, IterateMethod.DPO)):
        for name in names.model_fields:
            if name in given and c.method is not owner:
                yield f"--{name} belongs to --method {owner}, but --method is {c.method}: leave it out."
    yield from infer.reward_template_problems(c.reward_template)
    if c.method is not IterateMethod.CSFT and c.best_of_n < 2:
        yield "{best_of_n} leaves {method} nothing to choose from: set it to 2 or more."
