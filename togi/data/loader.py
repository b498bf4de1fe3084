"""Prompts in a seeded order, with a position that can be saved and resumed exactly.

Every prompt comes once per episode over any sequence of takes, saves and resumes. The order depends only on the seed, the
episode and the number of prompts, not on ranks or on how many are taken at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from togi.data.prompts import fingerprint
from togi.errors import DataError
from togi.sample import Prompt


@dataclass(frozen=True, slots=True)
class LoaderState:
    """The position of a loader: ``position`` prompts of ``episode`` (from 0) have been taken."""

    episode: int
    position: int
    seed: int
    num_prompts: int
    fingerprint: str

    def to_json(self) -> dict[str, int | str]:
        return asdict(self)


class PromptLoader:
    """Returns the prompts of a set ``episodes`` times, each time in another seeded order."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, episodes: int) -> None:
        assert len(prompts) > 0 and episodes > 0
        self._prompts = prompts
        self._seed = seed
        self._episodes = episodes
        self._fingerprint = fingerprint(prompts)
        self._start(0)

    @property
    def episode(self) -> int:
        """The episode of the next prompt, from 0; equal to the number of episodes when all are done."""
        return self._episode

    @property
    def remaining(self) -> int:
        """Prompts left over all episodes (negative after resuming a run that had more episodes)."""
        return (self._episodes - self._episode) * len(self._prompts) - self._position

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; fewer at the end of an episode, which no batch crosses; empty when all are done."""
        assert n > 0
        if self.remaining <= 0:
            return []
        chosen = self._order[self._position : self._position + n]
        self._position += len(chosen)
        if self._position == len(self._prompts):
            self._start(self._episode + 1)
        return [self._prompts[i] for i in chosen]

    def state(self) -> LoaderState:
        """The position, to be saved in a checkpoint."""
        return LoaderState(self._episode, self._position, self._seed, len(self._prompts), self._fingerprint)

    def load_state(self, state: LoaderState) -> None:
        """Resume at ``state``. Raises DataError if it was saved with other prompts or another seed."""
        if state.num_prompts != len(self._prompts):
            raise DataError(
                f"The checkpoint was made with {state.num_prompts} prompts but the prompt set now has "
                f"{len(self._prompts)}: resume with the same data, or start a new run."
            )
        if state.fingerprint != self._fingerprint:
            raise DataError(
                "The checkpoint was made with other prompts (as many, but not the same): "
                "resume with the same data and templates, or start a new run."
            )
        if state.seed != self._seed:
            raise DataError(
                f"The checkpoint was made with --seed {state.seed} but this run has --seed {self._seed}, which is "
                "another order of the prompts: resume with the same seed."
            )
        self._start(state.episode)
        self._position = state.position

    def _start(self, episode: int) -> None:
        self._episode = episode
        self._position = 0
        self._order = np.random.default_rng([self._seed, episode]).permutation(len(self._prompts)).tolist()
