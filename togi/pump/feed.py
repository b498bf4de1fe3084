"""The source of scored groups for the RL loop: generated here, or read from an earlier run.

``take`` generates with the current weights and returns when every group is scored (``max_staleness = 0``, synchronous). Groups
are scored as they finish, while others still generate.

Training on the rollouts of an earlier run: stored groups replace the generation engine and the rewards.

Tokens, engine logprobs and rewards are stored exactly, so a replay with the same settings repeats the run's updates bit for bit.
With another backend, number of workers or placement it shows what those change. Only the messages of failed rewards are
not stored.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, Self

from togi.data.prompts import PromptLoader
from togi.errors import DataError
from togi.obs.rollout_store import RolloutStore, Row, Split
from togi.obs.run_dir import RunDirectory
from togi.pump.experience import GroupFilter, ScoredGroup
from togi.reward.scores import ErrorLimit, LengthPenalties, Reward
from togi.rollout.collect import Environment, Generate, all_or_none, collect_groups
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score

MAX_IN_FLIGHT = 4096


class Feed(Protocol):
    """The interface of the loop, which does not know when or where groups are made."""

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts, ``samples`` rollouts each, in the loader's order, for ``step``."""
        ...


@dataclass(frozen=True)
class RolloutFeed:
    """Turns prompts into scored groups. With ``seed`` every sample has its own seed, whatever the timing.

    ``max_errors``: the largest share of samples whose reward may fail. ``penalties`` None: no length penalty. ``filtering`` None:
    every group is kept.
    """

    environment: Environment
    generate: Generate
    reward: Reward
    seed: int | None
    max_errors: float
    penalties: LengthPenalties | None = None
    filtering: GroupFilter | None = None

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """Scored groups of the next prompts, ``samples`` rollouts each, in the loader's order.

        Takes ``count`` prompts, or with filtering as many as it takes to keep ``count`` groups; fewer at the end of an
        episode. The result includes filtered groups. Raises RewardError if more rewards fail than allowed, and
        ConfigError if too few groups are kept.
        """
        if self.filtering is None:
            return await self.run(loader.take(count), samples, f"step{step}")
        return await self._fill(self.filtering, loader, count, samples, f"step{step}")

    async def run(self, prompts: Sequence[Prompt], samples: int, name: str) -> list[ScoredGroup]:
        """Generate and score ``samples`` rollouts of each prompt, in order. ``name``: keeps the group ids of calls apart.

        Raises RewardError if more rewards fail than allowed.
        """
        limit = ErrorLimit(self.max_errors, len(prompts) * samples)
        ids = [f"{name}/{place}/{prompt.id}" for place, prompt in enumerate(prompts)]
        result: dict[str, ScoredGroup] = {}

        async def score(group: Sequence[Rollout]) -> None:
            result[group[0].group_id] = await self._scored(group, limit)

        # Scoring starts as soon as a group is complete, in any order.
        groups = self._collected(zip(ids, prompts, strict=True), samples, MAX_IN_FLIGHT)
        scoring: list[asyncio.Task[None]] = []
        try:
            async for group in groups:
                scoring.append(asyncio.create_task(score(group)))
                for task in scoring:
                    if task.done():
                        task.result()  # raises at the first failed reward, not after the last rollout
            await asyncio.gather(*scoring)
        finally:
            for task in scoring:
                task.cancel()
        return [result[group_id] for group_id in ids]

    async def _fill(
        self, filtering: GroupFilter, loader: PromptLoader, count: int, samples: int, name: str
    ) -> list[ScoredGroup]:
        """All groups that it took to keep ``count`` of them, or as many as the rest of the episode gives.

        Each of ``count`` places tries one prompt after the other until a group is kept. A prompt is taken only after
        that many have failed, so the choice of prompts does not depend on timing, and no group is generated for nothing.
        """
        groups: dict[int, ScoredGroup] = {}
        limit = ErrorLimit(self.max_errors, 0)
        free = asyncio.Semaphore(max(1, MAX_IN_FLIGHT // samples))

        def source() -> Iterator[tuple[int, Prompt]]:
            taken, episode = 0, loader.episode
            while loader.episode == episode and loader.remaining > 0:
                filtering.check_budget(taken, sum(not group.filtered for group in groups.values()), count)
                limit.total += samples
                yield taken, loader.take(1)[0]
                taken += 1

        prompts = source()

        async def place() -> None:
            for number, prompt in prompts:
                async with free:
                    alone = self._collected([(f"{name}/{number}/{prompt.id}", prompt)], samples, samples)
                    [rollouts] = [rollouts async for rollouts in alone]
                    group = await self._scored(rollouts, limit)
                groups[number] = group
                if not group.filtered:
                    return

        await all_or_none(place() for _ in range(count))
        return [groups[number] for number in sorted(groups)]

    def _collected(
        self, prompts: Iterable[tuple[str, Prompt]], samples: int, most: int
    ) -> AsyncIterator[Sequence[Rollout]]:
        """The groups of ``prompts`` (group id, prompt), as they finish; at most ``most`` rollouts at once."""
        return collect_groups(
            prompts, self.environment, self.generate, n_samples=samples, max_in_flight=most, seed=self.seed
        )

    async def _scored(self, group: Sequence[Rollout], limit: ErrorLimit) -> ScoredGroup:
        scores = await self.reward.score(group)
        limit.count(scores)
        # Filter on the reward itself; a length penalty would make equal rewards differ.
        filtered = self.filtering is not None and not self.filtering.keeps(scores)
        if self.penalties is not None:
            scores = self.penalties.applied(group, scores)
        return ScoredGroup(tuple(group), tuple(scores), filtered)


@dataclass(frozen=True)
class ReplayFeed:
    """A ``Feed`` that returns the stored groups of its prompts.

    ``filtering``: each rollout of the run took as many prompts as it needed, and so does its replay.
    """

    store: RolloutStore
    filtering: bool = False

    @classmethod
    def of(cls, folder: str, *, filtering: bool) -> Self:
        """The feed of the run in ``folder``."""
        return cls(RunDirectory(Path(folder)).rollouts, filtering)

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts as they were trained in ``step``, in the loader's order."""
        return self.groups(loader.take(self.prompts_of(step, count)), samples, step)

    def prompts_of(self, step: int, count: int) -> int:
        """How many prompts ``step`` took: ``count``, or with filtering the number that is stored (0 if nothing is)."""
        if not self.filtering:
            return count
        files = [file for file in self.store.files() if (file.step, file.split) == (step, Split.TRAIN)]
        return len({row["group_id"] for file in files for row in self.store.read_columns(file, ["group_id"])})

    def steps_for(self, prompts: int) -> int:
        """With filtering: the number of steps in which the run used up ``prompts``; one more than are stored if it did not."""
        step = 1
        while (taken := self.prompts_of(step, 0)) > 0 and prompts > taken:
            prompts, step = prompts - taken, step + 1
        return step

    def check(self, rollouts: int) -> None:
        """Raise DataError unless steps 1 to ``rollouts`` are stored."""
        there = {file.step for file in self.store.files() if file.split is Split.TRAIN}
        missing = [step for step in range(1, rollouts + 1) if step not in there]
        if missing:
            raise DataError(
                f"--replay: {self.store.folder} has no rollouts of step {missing[0]}, but this run takes {rollouts} steps: "
                f"{'set --max_steps to ' + str(missing[0] - 1) if missing[0] > 1 else 'give the folder of a run of togi rl'}."
            )

    def groups(self, prompts: Sequence[Prompt], samples: int, step: int) -> list[ScoredGroup]:
        """The stored groups of ``step``, one for each of ``prompts``.

        Raises DataError if they have other prompts, other tokens of a prompt, or another number of samples.
        """
        rows = [row for row in self.store.read_step(step) if row["split"] == Split.TRAIN]
        groups = [list(group) for _, group in groupby(rows, key=lambda row: str(row["group_id"]))]
        where = f"--replay: step {step} of {self.store.folder}"
        if len(groups) != len(prompts):
            raise DataError(
                f"{where} has {len(groups)} prompts, but this run takes {len(prompts)}: give the prompts of that run."
            )
        # In the order of what a user can confuse: data, tokenizer, samples.
        for group, prompt in zip(groups, prompts, strict=True):
            if group[0]["prompt_id"] != prompt.id:
                raise DataError(
                    f"{where} trained on prompt {group[0]['prompt_id']} where this run takes {prompt.id}: give the prompts of "
                    "that run, with its --max_samples and --prompt_max_len."
                )
            if tuple(group[0]["prompt_tokens"]) != prompt.tokens:
                raise DataError(
                    f"{where} has other tokens of prompt {prompt.id} than this run: use the tokenizer, template and data of that "
                    "run."
                )
            if len(group) != samples:
                raise DataError(
                    f"{where} has {len(group)} samples of prompt {prompt.id}, not --n_samples_per_prompt {samples}: make them "
                    "equal."
                )
        return [_group(group) for group in groups]


def _group(rows: Sequence[Row]) -> ScoredGroup:
    first = rows[0]
    label, tokens = json.loads(first["label"]), tuple(first["prompt_tokens"])
    prompt = Prompt(first["prompt_id"], tokens, first["prompt_text"], label, first["datasource"])
    rollouts = []
    for row in rows:
        tokens, mask, logprobs = (tuple(row[name]) for name in ("response_tokens", "response_mask", "rollout_logprobs"))
        reason, version = FinishReason(row["finish_reason"]), row["policy_version"]
        rollouts.append(Rollout(prompt, row["group_id"], tokens, mask, logprobs, row["response_text"], reason, version))
    scores = tuple(Score(Outcome(row["outcome"]), row["reward"], row["components"]) for row in rows)
    return ScoredGroup(tuple(rollouts), scores, first["filtered"])
