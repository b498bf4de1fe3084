"""Training on the rollouts of an earlier run: stored groups replace the generation engine and the rewards.

Tokens, engine logprobs and rewards are stored exactly, so a replay with the same settings repeats the run's updates bit for bit.
With another backend, number of workers or placement it shows what those change. Only the messages of failed rewards are
not stored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from togi.data.loader import PromptLoader
from togi.errors import DataError
from togi.obs.rollout_store import RolloutRow, RolloutStore, Split
from togi.obs.run_dir import RunDirectory
from togi.pump.experience import ScoredGroup
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score


def replay_feed(folder: str, *, filtering: bool) -> ReplayFeed:
    """The feed of the run in ``folder``."""
    return ReplayFeed(RunDirectory(Path(folder)).rollouts, filtering=filtering)


class ReplayFeed:
    """A ``Feed`` that returns the stored groups of its prompts.

    ``filtering``: each rollout of the run took as many prompts as it needed, and so does its replay.
    """

    def __init__(self, store: RolloutStore, *, filtering: bool = False) -> None:
        self._store = store
        self._filtering = filtering

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts as they were trained in ``step``, in the loader's order."""
        return self.groups(loader.take(self.prompts_of(step, count)), samples, step)

    def prompts_of(self, step: int, count: int) -> int:
        """How many prompts ``step`` took: ``count``, or with filtering the number that is stored (0 if nothing is)."""
        if not self._filtering:
            return count
        files = [file for file in self._store.files() if (file.step, file.split) == (step, Split.TRAIN)]
        return len({row["group_id"] for file in files for row in self._store.read_columns(file, ["group_id"])})

    def steps_for(self, prompts: int) -> int:
        """With filtering: the number of steps in which the run used up ``prompts``; one more than are stored if it did not."""
        step = 1
        while (taken := self.prompts_of(step, 0)) > 0 and prompts > taken:
            prompts, step = prompts - taken, step + 1
        return step

    def check(self, rollouts: int) -> None:
        """Raise DataError unless steps 1 to ``rollouts`` are stored."""
        there = {file.step for file in self._store.files() if file.split is Split.TRAIN}
        missing = [step for step in range(1, rollouts + 1) if step not in there]
        if missing:
            raise DataError(
                f"--replay: {self._store.folder} has no rollouts of step {missing[0]}, but this run takes {rollouts} steps: "
                f"{'set --max_steps to ' + str(missing[0] - 1) if missing[0] > 1 else 'give the folder of a run of togi rl'}."
            )

    def groups(self, prompts: Sequence[Prompt], samples: int, step: int) -> list[ScoredGroup]:
        """The stored groups of ``step``, one for each of ``prompts``.

        Raises DataError if they have other prompts, other tokens of a prompt, or another number of samples.
        """
        rows = [row for row in self._store.read_step(step) if row.split is Split.TRAIN]
        groups = [list(group) for _, group in groupby(rows, key=lambda row: row.group_id)]
        where = f"--replay: step {step} of {self._store.folder}"
        if len(groups) != len(prompts):
            raise DataError(
                f"{where} has {len(groups)} prompts, but this run takes {len(prompts)}: give the prompts of that run."
            )
        # In the order of what a user can confuse: data, tokenizer, samples.
        for group, prompt in zip(groups, prompts, strict=True):
            if group[0].prompt_id != prompt.id:
                raise DataError(
                    f"{where} trained on prompt {group[0].prompt_id} where this run takes {prompt.id}: give the prompts of "
                    "that run, with its --max_samples and --prompt_max_len."
                )
            if group[0].prompt_tokens != prompt.tokens:
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


def _group(rows: Sequence[RolloutRow]) -> ScoredGroup:
    first = rows[0]
    prompt = Prompt(first.prompt_id, first.prompt_tokens, first.prompt_text, json.loads(first.label), first.datasource)
    rollouts, scores = tuple(_rollout(row, prompt) for row in rows), tuple(_score(row) for row in rows)
    return ScoredGroup(rollouts, scores, first.filtered)


def _rollout(row: RolloutRow, prompt: Prompt) -> Rollout:
    return Rollout(
        prompt=prompt,
        group_id=row.group_id,
        response_tokens=row.response_tokens,
        response_mask=row.response_mask,
        response_logprobs=row.rollout_logprobs,
        response_text=row.response_text,
        finish_reason=FinishReason(row.finish_reason),
        policy_version=row.policy_version,
    )


def _score(row: RolloutRow) -> Score:
    return Score(Outcome(row.outcome), row.reward, dict(row.components))
