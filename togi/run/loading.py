"""What several commands load or check in the same way: the tokenizer, how prompts are read, and a reward model in this process."""

from collections.abc import Sequence
from inspect import signature
from typing import TypeVar

import torch

from togi.algo.partial_attention import has_flash
from togi.config.fields import Settings
from togi.config.infer import ChatConfig, InferConfig
from togi.config.iterate import IterateConfig
from togi.config.rl import RLConfig
from togi.config.shared import ModelSettings, VLLMSettings
from togi.config.tools import ServeRMConfig
from togi.data import chat
from togi.data.packing import in_order, pack_all
from togi.data.prompts import PromptSpec
from togi.learn.scorer import Scorer
from togi.methods.method import Method
from togi.model.loading import ModelSource, check_causal_lm, dtype_of, load_scalar_model
from togi.parallel import frozen
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World
from togi.plan.engine_args import extra_arguments
from togi.reward.scores import Standardization
from togi.rollout.engine import EngineSettings
from togi.weights.files import local_folder
from togi.workers.worker_group import as_sample

UNLIMITED = 2**62
Spec = TypeVar("Spec")


def tokenizer_of(config: ModelSettings | InferConfig | ChatConfig | IterateConfig) -> chat.Tokenizer:
    """The tokenizer of ``--pretrain``, with the chat template that the user gave. Raises DataError."""
    template, trust = config.tokenizer_chat_template, config.trust_remote_code
    return chat.load_tokenizer(config.pretrain, chat_template=template, trust_remote_code=trust)


def spec_of(kind: type[Spec], config: Settings, **changed: object) -> Spec:
    """A record with the settings of its fields' names; ``changed`` in place of them."""
    return kind(**config.model_dump(include=set(signature(kind).parameters)) | changed)


def prompt_spec(config: RLConfig | IterateConfig, data: str, split: str, *, training: bool) -> PromptSpec:
    """How to read a prompt set. Probabilities and --max_samples apply to the training set only."""
    whole = {} if training else {"prompt_data_probs": None, "max_samples": UNLIMITED}
    return spec_of(PromptSpec, config, prompt_data=data, split=split, acts=config.acts, **whole)


def check_start(config: RLConfig | Method, *, flash_attn: bool, asked: str, longest: int) -> None:
    """Check that the model that training starts from fits the settings (``check_causal_lm``); no weights are read."""
    check_causal_lm(
        config.pretrain,
        flash_attn=flash_attn,
        trust_remote_code=config.trust_remote_code,
        lora=config.lora,
        balanced=config.aux_loss_coef > 0,
        asked=asked,
        longest=longest,
    )


def engine_settings(config: RLConfig | Method | InferConfig, engine: VLLMSettings, max_len: int) -> EngineSettings:
    """The settings of an engine in this process that every command has."""
    return EngineSettings(
        model=local_folder(config.pretrain),
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=max_len,
        seed=config.seed,
        enforce_eager=engine.enforce_eager,
        quantization=engine.vllm_quantization,
        kv_cache_dtype=engine.vllm_kv_cache_dtype,
        kv_cache_gb=engine.vllm_cpu_kv_cache_gb,
        extra=extra_arguments(engine.vllm_args),
        trust_remote_code=config.trust_remote_code,
    )


class RewardModel:
    """A frozen reward model in this process. Raises ModelError for a folder that holds none.

    ``standardize``: by the statistics in the model's config with ``--normalize_reward``, else nothing.
    """

    def __init__(
        self,
        path: str,
        config: RLConfig | InferConfig | ServeRMConfig,
        device: torch.device | None = None,
        *,
        in_4bit: bool = False,
    ) -> None:
        world, trust = World.solo(device), config.trust_remote_code
        flash_attn = config.flash_attn and has_flash(world.device)
        source = ModelSource(path, dtype_of(config.bf16), flash_attn, trust, in_4bit=in_4bit)
        model = load_scalar_model(source, value_head_prefix=config.value_head_prefix)
        statistics = (model.reward_mean, model.reward_std) if config.normalize_reward else ()
        self.config, self.standardize = model.hf.config, Standardization(*statistics)
        self._scorer = Scorer(model, world, frozen(model, world, BackendOptions(config.bf16, 0, (0.9, 0.95), 0.0)))

    def scores(
        self, sequences: Sequence[Sequence[int]], max_tokens: int, max_sequences: int | None = None
    ) -> list[float]:
        """The raw score at the last token of each sequence. Packs have no padding, and at most so many tokens and sequences."""
        samples = [as_sample(tokens) for tokens in sequences]
        packs = pack_all(samples, max_tokens=max_tokens, max_sequences=max_sequences, share_prefix=False)
        scores: list[float] = in_order(packs, self._scorer.scores(packs).tolist())
        return scores
