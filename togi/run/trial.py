"""A few groups sampled from the policy in this process: no Ray, no vLLM, one copy of the weights."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from togi.config.choices import EngineName
from togi.config.rl import RLConfig
from togi.data.loader import PromptLoader
from togi.data.packing import pack_all
from togi.errors import ConfigError
from togi.learn.scorer import Scorer
from togi.model.hub import local_folder
from togi.model.loading import ModelSource, dtype_of, load_scalar_model
from togi.obs.progress import Progress
from togi.obs.way_out import way_out
from togi.parallel.backend import backend_options
from togi.parallel.build import frozen
from togi.parallel.process import World
from togi.pump.experience import ScoredGroup
from togi.pump.filtering import GroupFilter
from togi.reward.combine import CombinedReward, LengthPenalties
from togi.reward.local_model import LocalModelReward, Standardization
from togi.rollout.collect import collect_groups
from togi.rollout.create import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.run.rl_rewards import combined, reward_names
from togi.run.rl_setup import Material
from togi.sample import Rollout
from togi.workers.model_reward import as_sample

MOST_AT_ONCE = 256


async def sample(config: RLConfig, material: Material, groups: int, progress: Progress) -> list[ScoredGroup]:
    """The groups of the first prompts that the run would take, scored as in its first rollout.

    Any number of reward errors is allowed; they are among the scores. Raises UserError.
    """
    with progress.phase("loading the model to sample from", expected_seconds=10):
        engine = _engine(config)
        reward = combined(config, material.rewards, [local_reward(config, i) for i in range(len(config.reward_models))])
    try:
        with progress.phase("sampling"):
            return await _scored(config, material, groups, engine, reward)
    finally:
        with way_out("shutting the engine down"):
            await engine.shutdown()


async def _scored(
    config: RLConfig, material: Material, groups: int, engine: RolloutEngine, reward: CombinedReward
) -> list[ScoredGroup]:
    prompts = PromptLoader(material.prompts, seed=config.seed, episodes=1).take(groups)
    places = {f"trial/{place}": prompt for place, prompt in enumerate(prompts)}
    collected = collect_groups(
        places.items(),
        material.environment(config, config.temperature),
        engine.generate,
        n_samples=config.n_samples_per_prompt,
        max_in_flight=MOST_AT_ONCE,
        seed=config.seed,
    )
    # Groups finish in any order; the report is in the order of the prompts.
    found = {group[0].group_id: group async for group in collected}
    ordered = [found[place] for place in places]
    return list(await asyncio.gather(*(_one(config, group, reward) for group in ordered)))


async def _one(config: RLConfig, group: Sequence[Rollout], reward: CombinedReward) -> ScoredGroup:
    """Score a group as the feed of the run does: filter on the raw rewards, then apply length penalties."""
    scores, filtering = await reward.score(group), GroupFilter.of(config)
    filtered = filtering is not None and not filtering.keeps(scores)
    if config.uses_length_penalties:
        scores = LengthPenalties.of(config).applied(group, scores)
    return ScoredGroup(tuple(group), tuple(scores), filtered)


def _engine(config: RLConfig) -> RolloutEngine:
    settings = EngineSettings(
        model=local_folder(config.pretrain),
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.context_length,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
    try:
        return create_engine(EngineName.TRANSFORMERS, settings)
    except ConfigError as error:  # its advice is another engine, but sampling has only this one
        reason = str(error).partition(":")[0]
        raise ConfigError(f"--sample_groups samples with Transformers, but {reason}: leave it out.") from None


def local_reward(config: RLConfig, number: int) -> LocalModelReward:
    """One of ``--reward_pretrain``, loaded into this process, under its name in the run."""
    world = World.solo()
    model = load_scalar_model(
        ModelSource(config.reward_models[number], dtype_of(config.bf16), trust_remote_code=config.trust_remote_code),
        value_head_prefix=config.value_head_prefix,
    )
    standardize = Standardization(model.reward_mean, model.reward_std) if config.normalize_reward else None
    scorer = Scorer(frozen(model, world, backend_options(config, bf16=config.bf16)), world)
    name = reward_names(config, function_given=False)[number]
    return LocalModelReward(_scores(config, scorer), standardize, name)


def _scores(config: RLConfig, scorer: Scorer) -> Callable[[Sequence[Sequence[int]]], Awaitable[list[float]]]:
    async def scores(sequences: Sequence[Sequence[int]]) -> list[float]:
        packs = pack_all(
            [as_sample(tokens) for tokens in sequences],
            max_tokens=config.max_tokens_per_gpu,
            max_sequences=None,
            share_prefix=False,
        )
        found: list[float] = packs.in_order(scorer.scores(packs.batches).tolist())
        return found

    return scores
