"""The settings of the commands beside training: ``togi check``, ``togi export``, ``togi merge-lora``, ``togi serve-rm``."""

import ipaddress
from collections.abc import Iterator
from typing import Literal

from togi.config.fields import Count, Int, PathText, Positive, Settings, flag, refuse
from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.config.shared import DISABLE_FAST_TOKENIZER
from togi.errors import ConfigError

SAMPLE_GROUPS = "sample_groups"


class RLCheckConfig(RLConfig):
    """Would it learn?"""

    sample_groups: Int = flag(
        0,
        "Load the model to train, sample answers to so many prompts, score them with the reward and say what would stop "
        "learning; 0 loads no weights.",
        ge=0,
    )


def without_check(parsed: Parsed[RLCheckConfig]) -> tuple[Parsed[RLConfig], int]:
    """The settings of the run itself, and the number of groups to sample. Raises ConfigError."""
    config = parsed.config
    if config.sample_groups > 0 and config.replay is not None:
        raise ConfigError("--sample_groups generates, and --replay reads what was generated: leave one of them out.")
    sources = {name: source for name, source in parsed.sources.items() if name != SAMPLE_GROUPS}
    plain = RLConfig(**config.model_dump(exclude={SAMPLE_GROUPS}))
    return Parsed(plain, sources), config.sample_groups


class ExportConfig(Settings):
    """Make a plain Hugging Face folder with a model card of a run's final model, or of one of its checkpoints."""

    run_dir: PathText = flag("", "Folder of the run (--run_dir of its command). Required.")
    output_path: PathText = flag("", "Folder for the model. Required.")
    ckpt: PathText | None = flag(
        None,
        "A checkpoint of the run in place of its final model: one folder, or the --ckpt_path of the run for the newest. "
        "Any backend, ZeRO stage and number of ranks.",
    )
    role: Literal["actor", "critic"] = flag("actor", "Which model of togi rl.")
    pretrain: PathText | None = flag(None, "The model that training started from, where it has moved since.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")


class MergeConfig(Settings):
    """Merge a LoRA adapter into its base model."""

    lora_path: PathText = flag("", "Folder of the adapter: the --save_path of a run with --lora_rank. Required.")
    output_path: PathText = flag("", "Folder for the merged model. Required.")
    model_path: PathText = flag("", "Base model; default: the one that the adapter was trained on.")
    is_rm: bool = flag(False, "The model has a scalar head: a reward model or a critic.")
    bf16: bool = flag(False, "Write bfloat16; the sum itself is always made in float32.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")


class ServeRMConfig(Settings):
    """Serve a reward model, or a reward function, over HTTP: POST /get_reward, GET /health, GET /metrics."""

    reward_pretrain: PathText = flag("", "Reward model with a scalar head: a folder or hub name.")
    reward_func: PathText = flag("", "Python file that defines reward_func(queries, prompts, labels), not a model.")
    host: str = flag("127.0.0.1", "Address to listen on; others than this machine's own need a token.")
    port: Int = flag(5000, "TCP port; 0 takes a free one and says which.", ge=0, le=65535)
    token_file: PathText | None = flag(
        None,
        "File with the bearer token that requests must carry; default: TOGI_REWARD_TOKEN of the environment, if set.",
    )
    allow_unauthenticated: bool = flag(False, "Listen on other addresses without a token.")
    max_len: Count = flag(2048, "Queries of more tokens are refused, never cut.")
    batch_size: Count | None = flag(None, "At most this many queries per forward; default: by the token budget.")
    max_tokens_per_gpu: Count = flag(16384, "Token budget of one packed forward; queries of several requests share it.")
    normalize_reward: bool = flag(False, "Standardise scores with the mean and std of the model's config.")
    value_head_prefix: str = flag("score", "Attribute name of the scalar head; a model's own config wins.")
    bf16: bool = flag(False, "Compute in bfloat16. Default: on GPUs that have it.")
    flash_attn: bool = flag(True, "PyTorch's FlashAttention where it computes (CUDA in bfloat16).")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
    reward_timeout: Positive = flag(60.0, "Seconds one call of the reward function may take before it is stopped.")
    reward_workers: Count = flag(2, "Processes that run the reward function.")
    max_body_mb: Positive = flag(64.0, "Largest body of a request, in MB.")
    max_items: Count = flag(1024, "Most queries in one request.")
    max_queue: Count = flag(8192, "Most queries that wait at once; beyond, requests are told to come back (429).")
    disable_fast_tokenizer: bool = DISABLE_FAST_TOKENIZER
    load_in_4bit: bool = flag(False, "Hold the weights in NF4.")
    use_ms: bool = flag(False, "Take names of models and data sets from ModelScope instead of the Hugging Face hub.")


def check_serve_rm(config: ServeRMConfig, *, has_token: bool) -> None:
    """Raise ConfigError with the first contradiction in the settings of ``togi serve-rm``."""
    refuse(config, _problems(config, has_token=has_token))


def _problems(c: ServeRMConfig, *, has_token: bool) -> Iterator[str]:
    if not c.reward_pretrain and not c.reward_func:
        yield "There is nothing to serve: give --reward_pretrain MODEL or --reward_func FILE.py."
    if c.reward_pretrain and c.reward_func:
        yield "--reward_pretrain and --reward_func exclude each other: serve them on two ports."
    if c.reward_func and not c.reward_func.endswith(".py"):
        yield "{reward_func} must be a Python file that defines reward_func(queries, prompts, labels)."
    if c.normalize_reward and not c.reward_pretrain:
        yield "--normalize_reward works on a reward model: add --reward_pretrain or leave it out."
    if c.max_len > c.max_tokens_per_gpu:
        yield "{max_len} is more than {max_tokens_per_gpu}: lower the first."
    if c.max_items > c.max_queue:
        yield "{max_items} is more than {max_queue}: raise the second or lower the first."
    if not is_loopback(c.host) and not has_token and not c.allow_unauthenticated:
        yield "{host} lets others in without a token: set TOGI_REWARD_TOKEN or --token_file, or add --allow_unauthenticated."


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
