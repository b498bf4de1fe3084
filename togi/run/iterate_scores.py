"""Scoring in ``togi iterate``: the outputs of a round by functions, servers and reward models together, as in ``togi rl``."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from togi.config.iterate import IterateConfig
from togi.data.row_log import RowLog, digest
from togi.obs.way_out import way_out
from togi.reward.scores import ErrorLimit, Reward, takes_group
from togi.run.rewards import EarlyRewards, combined
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score

logger = logging.getLogger(__name__)
Row = dict[str, Any]
"""A row of a JSON file."""


async def score_rows(config: IterateConfig, rows: Sequence[Row], models: Sequence[Sequence[float]], path: Path) -> None:
    """Write the rows with the "reward" of each to ``path``: null where it abstained, where it failed (then "reward_error" says
    why), and where another output of the prompt failed, unless --on_reward_error is drop_sample.

    ``models``: the scores of each reward model. What is scored is logged, failures are not, so that a resume tries them again.
    Raises RewardError if more fail than allowed, and as the sources do.
    """
    # The outputs of a prompt are scored together.
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row["id"], []).append(place)
    text = "\n".join(f"{row['input']}\0{row['output']}" for row in rows).encode("utf-8", "surrogatepass")
    limit = ErrorLimit(config.allowed_reward_errors, len(rows))
    failed: dict[int, list[Row]] = {}
    # Enough to keep every worker and connection busy.
    room = asyncio.Semaphore(max(2 * config.reward_workers, config.remote_rm_concurrency))

    async def score(reward: Reward, log: RowLog, unit: int, places: Sequence[int]) -> None:
        group = [rows[place] for place in places]
        async with room:
            scores = await reward.score([_rollout(row) for row in group])
        limit.count(scores)
        dropped = takes_group(scores, config.on_reward_error)
        found = [_scored(row, score, dropped=dropped) for row, score in zip(group, scores, strict=True)]
        if any("reward_error" in row for row in found):
            failed[unit] = found
        else:
            log.add(unit, found)

    with RowLog(path, {"outputs": digest(text)}) as log:
        try:
            async with rewards_of(config) as early, asyncio.TaskGroup() as tasks:
                ran = zip(early.names, models, strict=False)
                known = [ModelScores(name, {id: [of[i] for i in at] for id, at in groups.items()}) for name, of in ran]
                reward = combined(config, early, known)
                for unit, places in enumerate(groups.values()):
                    if unit not in log.done:
                        tasks.create_task(score(reward, log, unit, places))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if limit.errors > 0:
            logger.warning(
                "The reward of %d of %d outputs failed (--on_reward_error %s). The first: %s",
                limit.errors,
                limit.total,
                config.on_reward_error,
                next(row["reward_error"] for unit in sorted(failed) for row in failed[unit] if "reward_error" in row),
            )
        every = log.done | failed
        log.finish(row for unit in sorted(every) for row in every[unit])


def _scored(row: Row, score: Score, *, dropped: bool) -> Row:
    kept = {name: value for name, value in row.items() if name != "output_tokens"}
    kept["reward"] = score.value if score.outcome is Outcome.SCORE and not dropped else None
    return {**kept, "reward_error": score.message} if score.outcome is Outcome.ERROR else kept


@dataclass(frozen=True, slots=True)
class ModelScores:
    """A reward model as a source of reward: a command computed its scores, here by the id of the prompt."""

    name: str
    scores: Mapping[str, Sequence[float]]

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        found = self.scores[group[0].group_id]
        return [Score(Outcome.SCORE, value, {self.name: value}) for value in found]

    async def close(self) -> None:
        """Nothing to release."""


async def try_rewards(config: IterateConfig) -> None:
    """Call functions and servers as ``togi rl`` does before anything expensive starts. Raises UserError."""
    # They import torch, which the loop itself does not need.
    from togi.data.prompts import load_prompts
    from togi.run.loading import prompt_spec, tokenizer_of

    async with rewards_of(config) as early:
        tokenizer = tokenizer_of(config)
        specs = [prompt_spec(config, config.prompt_data, config.prompt_split, training=True)]
        if config.eval_dataset is not None:
            specs.append(prompt_spec(config, config.eval_dataset, config.eval_split, training=False))
        sets = [load_prompts(each, tokenizer) for each in specs]
        for each in sets:
            await early.check_labels(each, each.place)
        await early.check(chain(*sets), config.best_of_n)


@asynccontextmanager
async def rewards_of(config: IterateConfig) -> AsyncIterator[EarlyRewards]:
    """Functions in their processes and clients of servers, closed with the block. Raises RewardError."""
    early = EarlyRewards(config, None)
    try:
        if config.reward_urls:
            from togi.data.chat import visible
            from togi.run.loading import tokenizer_of

            early.connect_servers(config, partial(visible, tokenizer_of(config)))
        yield early
    finally:
        with way_out("closing the rewards"):
            await early.close()


def _rollout(row: Row) -> Rollout:
    """A row as a rollout for functions and servers, which see the prompt as text."""
    prompt = Prompt(row["id"], (0,), plain_input(row), row.get("label", ""), row.get("datasource", "default"))
    tokens, reason = tuple(row["output_tokens"]), FinishReason(row["finish_reason"])
    count = len(tokens)
    return Rollout(prompt, row["id"], tokens, (True,) * count, (0.0,) * count, row["output"], reason, (0,) * count)


def plain_input(row: Mapping[str, object]) -> str:
    """The prompt without the csft reward."""
    return str(row["prompt"] if "prompt" in row else row["input"])
