"""Generate outputs for a file of prompts (``generate``) and scores for a file of outputs (``score``).

Both write rows as they finish and end with a file in order (``togi.data.row_log``), so the same command resumes after a kill.
Settings are checked by ``start``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from togi.algo.best_of_n import mean_with_error, standardized
from togi.config.choices import EngineName, PostProcessor
from togi.config.infer import InferConfig
from togi.data import chat
from togi.data.precheck import asked_reward, with_reward
from togi.data.prompts import DEFAULT_DATASOURCE, PromptSpec, fingerprint, load_prompts
from togi.data.row_log import RowLog
from togi.data.rows import OutputSpec, read_outputs
from togi.data.source import load_mixture
from togi.errors import ConfigError, RewardError
from togi.model.loading import known_tokens
from togi.obs.progress import Progress
from togi.obs.way_out import way_out
from togi.parallel.process import be_deterministic, default_device
from togi.rollout import create_engine
from togi.rollout.collect import SingleTurn, collect_groups
from togi.rollout.engine import EngineSettings
from togi.run.iterate_steps import Row, digest, select
from togi.run.loading import RewardModel, spec_of, tokenizer_of
from togi.sample import FinishReason, Prompt, Rollout, Sampling
from togi.weights.files import local_folder

SCORED_AT_ONCE = 64
# Settings that the rows depend on, besides prompts and weights.
GENERATION = (
    "eval_task",
    "seed",
    "best_of_n",
    "max_new_tokens",
    "prompt_max_len",
    "temperature",
    "top_p",
    "greedy_sampling",
    "repetition_penalty",
    "keep_special_tokens",
    "label_key",
    "bf16",
)
SCORING = ("eval_task", "value_head_prefix", "bf16")
WEIGHTS = ("*.safetensors", "*.bin")
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Written:
    """The output of a finished command."""

    path: Path
    rows: int


def generate(config: InferConfig, announce: Announce) -> Written:
    """``--best_of_n`` outputs for every prompt of the slice, in the order of the prompts.

    Each output has its own seed, so the number of concurrent requests does not change the results.
    """
    if config.full_determinism:
        be_deterministic()
    with Progress() as progress:
        # Stage 1: prompts. No weights are loaded yet.
        with progress.phase("reading prompts", expected_seconds=8):
            tokenizer = tokenizer_of(config)
            known = known_tokens(config.pretrain, config.trust_remote_code)
            chat.check_vocabulary(tokenizer, config.pretrain, known, apply_chat_template=config.apply_chat_template)
            prompts, plain = ask(config, tokenizer, announce)
            largest = max((max(prompt.tokens, default=-1) for prompt in prompts), default=-1)
            chat.check_tokens(tokenizer, config.pretrain, known, lambda: largest)
        model = local_folder(config.pretrain)
        # Stage 2: generate what an earlier attempt did not; the log refuses rows of other settings or weights.
        identity = identity_of(config, GENERATION, model) | {"--dataset": fingerprint(prompts)}
        with RowLog(Path(config.output_path), identity) as log:
            left = [(unit, prompt) for unit, prompt in enumerate(prompts) if unit not in log.done]
            if len(left) < len(prompts):
                announce(f"{len(prompts) - len(left)} of {len(prompts)} prompts were done by an earlier attempt")
            progress.start_steps(len(prompts), done=len(log.done))
            if left:
                asyncio.run(_generate(config, model, tokenizer, left, plain, log, progress))
            rows = log.in_order()
            log.finish(rows)
    # Stage 3: report truncated outputs.
    cut = sum(row["finish_reason"] == FinishReason.LENGTH for row in rows)
    if cut > 0:
        announce(
            f"{cut} of {len(rows)} outputs reached --max_new_tokens {config.max_new_tokens} (finish_reason length)"
        )
    return Written(log.path, len(rows))


def ask(config: InferConfig, tokenizer: chat.Tokenizer, announce: Announce) -> tuple[list[Prompt], list[str]]:
    """The prompts of this slice, with the csft reward in them, and their texts without it. Too long prompts are dropped and
    counted.
    """
    sets = {"prompt_data": config.dataset, "prompt_data_probs": config.dataset_probs, "split": config.dataset_split}
    spec = spec_of(PromptSpec, config, **sets)
    prompts = load_prompts(spec, tokenizer)
    if prompts.report.picked > prompts.report.kept:
        announce(f"prompts left out: {prompts.report.drop_reasons()}")
    chosen = list(prompts)
    # --iter picks one block of prompts.
    if config.iter is not None:
        start = config.iter * config.rollout_batch_size
        chosen = chosen[start : start + config.rollout_batch_size]
        if not chosen:
            raise ConfigError(
                f"--iter {config.iter} starts at prompt {start} of {len(prompts)}: give a smaller one, or more prompts."
            )
    plain = [chat.as_plain_text(prompt.text, tokenizer) for prompt in chosen]
    if not config.enable_csft:
        return chosen, plain
    # Conditional SFT: the reward text makes a prompt longer, so its length is checked again.
    reward = asked_reward(config.csft_prompt, config.reward_template)
    texts = [with_reward(config.reward_template, prompt.text, reward) for prompt in chosen]
    ids = chat.encode(texts, tokenizer, add_special_tokens=not config.apply_chat_template)
    told = [replace(prompt, text=text, tokens=tuple(t)) for prompt, text, t in zip(chosen, texts, ids, strict=True)]
    kept = [place for place, prompt in enumerate(told) if len(prompt.tokens) <= config.prompt_max_len]
    if len(kept) < len(told):
        announce(f"prompts left out: {len(told) - len(kept)} too long with the reward text")
    return [told[place] for place in kept], [plain[place] for place in kept]


async def _generate(
    config: InferConfig,
    model: str,
    tokenizer: chat.Tokenizer,
    left: Sequence[tuple[int, Prompt]],
    plain: Sequence[str],
    log: RowLog,
    progress: Progress,
) -> None:
    """Log the rows of each prompt as soon as all its outputs are finished."""
    sampling = Sampling(
        config.max_new_tokens,
        config.sampling_temperature,
        config.top_p,
        stop_token_ids=chat.stop_token_ids(tokenizer, config.pretrain, chat=config.apply_chat_template),
        repetition_penalty=config.repetition_penalty,
    )
    environment = SingleTurn(partial(chat.visible if config.keep_special_tokens else chat.decode, tokenizer), sampling)
    settings = engine_settings(config, model)
    units = {prompt.id: unit for unit, prompt in left}
    with progress.phase("starting the engine", expected_seconds=15):
        engine = create_engine(config.engine, settings)
    try:
        groups = collect_groups(
            ((prompt.id, prompt) for _, prompt in left),
            environment,
            engine.generate,
            n_samples=config.best_of_n,
            # Twice the engine's capacity, so that it never waits for a request.
            max_in_flight=2 * settings.max_num_seqs,
            seed=config.seed,
        )
        async for group in groups:
            unit = units[group[0].prompt.id]
            log.add(unit, [_row(config, plain[unit], tokenizer, n, rollout) for n, rollout in enumerate(group)])
            progress.step(len(log.done))
    finally:
        with way_out("shutting the engine down"):
            await engine.shutdown()


def engine_settings(config: InferConfig, model: str) -> EngineSettings:
    """Settings of one engine on this machine."""
    on_cpu = torch.accelerator.current_accelerator() is None
    return EngineSettings(
        model=model,
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.context_length,
        seed=config.seed,
        enforce_eager=config.enforce_eager or on_cpu,
        enable_prefix_caching=config.enable_prefix_caching,
        tensor_parallel_size=config.tp_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_gb=config.vllm_cpu_kv_cache_gb,
        max_num_seqs=config.max_num_seqs if config.engine is EngineName.VLLM else config.micro_batch_size,
        trust_remote_code=config.trust_remote_code,
    )


def _row(config: InferConfig, plain: str, tokenizer: chat.Tokenizer, number: int, rollout: Rollout) -> Row:
    """An output row. ``input``: the text that the model continued; ``prompt``: the same without the csft reward."""
    row: Row = {
        "input": chat.as_plain_text(rollout.prompt.text, tokenizer),
        "output": rollout.response_text,
        "id": rollout.prompt.id,
        "sample": number,
        "finish_reason": rollout.finish_reason.value,
    }
    if config.enable_csft:
        row["prompt"] = plain
    if config.label_key is not None:
        row["label"] = rollout.prompt.label
    if rollout.prompt.datasource != DEFAULT_DATASOURCE:
        row["datasource"] = rollout.prompt.datasource
    return row


def score(config: InferConfig, announce: Announce) -> Written:
    """Score every row, then apply the post-processor. Other columns of a row are kept."""
    if config.full_determinism:
        be_deterministic()
    with Progress() as progress:
        # Stage 1: rows. No weights are loaded yet.
        with progress.phase("reading rows", expected_seconds=8):
            tokenizer = tokenizer_of(config)
            mixture = load_mixture(
                config.dataset,
                config.dataset_probs,
                split=config.dataset_split,
                seed=config.seed,
                max_samples=config.max_samples,
            )
            spec = OutputSpec(
                config.input_key, config.output_key, config.apply_chat_template, config.input_template, config.max_len
            )
            rows, ids = read_outputs(mixture, spec, tokenizer)
            known = known_tokens(config.pretrain, config.trust_remote_code)
            largest = max((max(tokens, default=-1) for tokens in ids), default=-1)
            chat.check_tokens(tokenizer, config.pretrain, known, lambda: largest)
        # Stage 2: score what an earlier attempt did not, then select.
        tokens = digest(repr(ids).encode())
        identity = identity_of(config, SCORING, local_folder(config.pretrain)) | {"--dataset": tokens}
        with RowLog(Path(config.output_path), identity) as log:
            scored = list(_scored(config, rows, _rewards(config, ids, log, progress)))
            estimate = mean_with_error([row["reward"] for row in scored])
            announce(f"mean reward {estimate.mean:.4f} +- {estimate.standard_error:.4f} over {estimate.count} rows")
            if config.selection is not None:
                selection = select(scored, config.selection, reward_template=config.reward_template)
                announce(f"{config.selection}: {selection.describe()}")
                scored = list(selection.rows)
            log.finish(scored)
    return Written(log.path, len(scored))


def _rewards(config: InferConfig, ids: Sequence[Sequence[int]], log: RowLog, progress: Progress) -> list[float]:
    """The rewards in row order, standardised with ``--normalize_reward``."""
    # A chunk is the unit of a resume.
    chunks = [ids[start : start + SCORED_AT_ONCE] for start in range(0, len(ids), SCORED_AT_ONCE)]
    with progress.phase("loading the reward model", expected_seconds=5):
        model = RewardModel(config.pretrain, config, default_device(max(config.local_rank, 0)))
    progress.start_steps(len(chunks), done=len(log.done))
    for number, chunk in enumerate(chunks):
        if number not in log.done:
            found = model.scores(chunk, config.max_tokens_per_gpu, config.micro_batch_size)
            log.add(number, [{"score": score} for score in found])
            progress.step(len(log.done))
    raw = [row["score"] for row in log.in_order()]
    for number, value in enumerate(raw):
        if not math.isfinite(value):
            raise RewardError(
                f"--pretrain {config.pretrain} gave {value} for row {number}: check its weights and its number format."
            )
    # csft z-scores over all rows; otherwise the statistics in the model's config are used.
    if config.normalize_reward and config.selection is PostProcessor.CSFT:
        return standardized(raw)
    return [model.standardize(value) for value in raw]


def _scored(config: InferConfig, rows: Sequence[Mapping[str, object]], rewards: Sequence[float]) -> Iterator[Row]:
    for row, reward in zip(rows, rewards, strict=True):
        rest = {name: value for name, value in row.items() if name not in (config.input_key, config.output_key)}
        yield {"input": row[config.input_key], "output": row[config.output_key], **rest, "reward": reward}


def identity_of(config: InferConfig, names: Sequence[str], model: str) -> dict[str, str]:
    """What must be equal for a resume: settings, and the weights by size and modification time."""
    settings = {f"--{name}": str(config.model_dump()[name]) for name in names}
    files = sorted(file for pattern in WEIGHTS for file in Path(model).glob(pattern))
    stamps = [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    weights = digest("\n".join(stamps).encode())
    return settings | {"--pretrain": config.pretrain, "weights of --pretrain": weights}
