"""The source of scored groups for the RL loop: generated here, or read from an earlier run.

``take`` generates with the current weights and returns when every group is scored (``max_staleness = 0``, synchronous). Groups
are scored as they finish, while others still generate.

Training on the rollouts of an earlier run: stored groups replace the generation engine and the rewards.

Tokens, engine logprobs and rewards are stored exactly, so a replay with the same settings repeats the run's updates bit for bit.
With another backend, number of workers or placement it shows what those change. Only the messages of failed rewards are
not stored.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol, Self

from togi.data.prompts import PromptLoader
from togi.errors import DataError
from togi.obs.rollout_store import RolloutStore, Split
from togi.obs.run_dir import RunDirectory
from togi.pump.experience import GroupFilter, ScoredGroup, group_of
from togi.reward.scores import ErrorLimit, LengthPenalties, Reward
from togi.rollout.collect import Environment, Generate, all_or_none, collect_groups
from togi.sample import Prompt, Rollout

MAX_IN_FLIGHT = 4096


class Feed(Protocol):
    """The interface of the loop, which does not know when or where groups are made."""

    async def take(self, step: int) -> list[ScoredGroup]:
        """The groups of ``step``, counted from 1: those to train on, and those that were filtered out meanwhile."""
        ...

    def published(self, version: int) -> None:
        """The weights that learnt from all groups taken so far are in the engines, as ``version``."""

    @property
    def episode(self) -> int:
        """The pass over the prompts that the next groups belong to, from 0."""

    @property
    def is_empty(self) -> bool:
        """Whether no group is left to take."""


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

    async def run(self, prompts: Sequence[Prompt], samples: int, name: str) -> list[ScoredGroup]:
        """Generate and score ``samples`` rollouts of each prompt, in order. ``name``: keeps the group ids of calls apart.

        Groups are scored as they finish, while others still generate. Raises RewardError if more rewards fail than allowed.
        """
        limit = ErrorLimit(self.max_errors, len(prompts) * samples)
        free = asyncio.Semaphore(max(1, MAX_IN_FLIGHT // samples))

        async def group(place: int, prompt: Prompt) -> ScoredGroup:
            async with free:
                rollouts = await self.generated(prompt, f"{name}/{place}/{prompt.id}", samples)
            return await self.scored(rollouts, limit)

        return await all_or_none(group(place, prompt) for place, prompt in enumerate(prompts))

    async def generated(self, prompt: Prompt, group_id: str, samples: int) -> list[Rollout]:
        """``samples`` rollouts of one prompt."""
        alone, own = [(group_id, prompt)], (self.environment, self.generate)
        collected = collect_groups(alone, *own, n_samples=samples, max_in_flight=samples, seed=self.seed)
        [rollouts] = [rollouts async for rollouts in collected]
        return rollouts

    async def scored(self, group: Sequence[Rollout], limit: ErrorLimit) -> ScoredGroup:
        """The rollouts of one prompt with their scores."""
        scores = await self.reward.score(group)
        limit.count(scores)
        # Filter on the reward itself; a length penalty would make equal rewards differ.
        filtered = self.filtering is not None and not self.filtering.keeps(scores)
        if self.penalties is not None:
            scores = self.penalties.applied(group, scores)
        return ScoredGroup(tuple(group), tuple(scores), filtered)


class ReplayFeed:
    """A ``Feed`` that returns the groups that an earlier run has stored, step by step. Its loader only counts them."""

    def __init__(self, store: RolloutStore, loader: PromptLoader, samples: int) -> None:
        self.store, self._loader, self._samples = store, loader, samples
        self._taken = 0

    @classmethod
    def of(cls, folder: str, loader: PromptLoader, samples: int) -> Self:
        """The feed of the run in ``folder``."""
        return cls(RunDirectory(Path(folder)).rollouts, loader, samples)

    @property
    def episode(self) -> int:
        return self._loader.episode

    @property
    def is_empty(self) -> bool:
        return self._loader.remaining <= 0 or self._taken >= self.last_step

    @cached_property
    def last_step(self) -> int:
        """The last step that is stored; 0 if there is none."""
        return max((file.step for file in self.store.files() if file.split is Split.TRAIN), default=0)

    def first_stale_step(self) -> int:
        """The first step with a token that older weights sampled than those that it trained; 0 if there is none."""
        for file in self.store.files():
            rows = self.store.read_columns(file, ["versions"]) if file.split is Split.TRAIN else []
            if any(version < file.step - 1 for row in rows for version in row["versions"]):
                return file.step
        return 0

    async def take(self, step: int) -> list[ScoredGroup]:
        """The groups of ``step``, in the order in which they were trained. Raises DataError if they are not of these prompts."""
        groups, self._taken = self.groups(step), step
        for _ in groups:
            self._loader.take(1)
        return groups

    def published(self, version: int) -> None:
        """Nothing waits for weights."""

    def prompts_of(self, step: int) -> int:
        """How many prompts ``step`` took; 0 if nothing is stored of it."""
        files = [file for file in self.store.files() if (file.step, file.split) == (step, Split.TRAIN)]
        return len({row["group_id"] for file in files for row in self.store.read_columns(file, ["group_id"])})

    def steps_for(self, prompts: int) -> int:
        """With filtering: the number of steps in which the run used up ``prompts``; one more than are stored if it did not."""
        step = 1
        while (taken := self.prompts_of(step)) > 0 and prompts > taken:
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

    def groups(self, step: int) -> list[ScoredGroup]:
        """The stored groups of ``step``.

        Raises DataError if they have prompts that this run does not have, other tokens of one, or another number of samples.
        """
        rows = [row for row in self.store.read_step(step) if row["split"] == Split.TRAIN]
        groups = [list(group) for _, group in groupby(rows, key=lambda row: str(row["group_id"]))]
        where = f"--replay: step {step} of {self.store.folder}"
        # In the order of what a user can confuse: data, tokenizer, samples.
        for group in groups:
            name = group[0]["prompt_id"]
            if (prompt := self._loader.prompts.get(name)) is None:
                raise DataError(
                    f"{where} trained on prompt {name}, which this run does not have: give the prompts of that run, with its "
                    "--max_samples and --prompt_max_len."
                )
            if not prompt.row and tuple(group[0]["prompt_tokens"]) != prompt.tokens:  # an environment begins otherwise
                raise DataError(
                    f"{where} has other tokens of prompt {name} than this run: use the data, tokenizer and template of that run."
                )
            if len(group) != self._samples:
                raise DataError(
                    f"{where} has {len(group)} samples of prompt {name}, not --n_samples_per_prompt {self._samples}: make them "
                    "equal."
                )
        return [group_of(group) for group in groups]
