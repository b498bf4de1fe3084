"""How many rollouts and optimizer steps a run has: arithmetic that is shown before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from togi.config.rl import RLConfig


@dataclass(frozen=True, slots=True)
class StepPlan:
    """``prompts`` of each rollout of one episode; ``rollouts`` and ``updates`` of the whole run.

    ``actor_updates`` are those of the actor, which may be frozen at first.
    """

    prompts: tuple[int, ...]
    rollouts: int
    updates: int
    actor_updates: int

    @classmethod
    def of(cls, config: RLConfig, num_prompts: int) -> StepPlan:
        """The last rollout of an episode takes the prompts that are left; none is dropped."""
        full, rest = divmod(num_prompts, config.rollout_batch_size)
        prompts = (config.rollout_batch_size,) * full + ((rest,) if rest > 0 else ())
        every = prompts * config.num_episodes
        used = every if config.max_steps < 0 else every[: config.max_steps]
        per_update, samples = config.train_batch_size, config.n_samples_per_prompt
        updates = [-(-count * samples // per_update) * config.max_epochs for count in used]
        return cls(prompts, len(used), sum(updates), sum(updates[max(0, config.freezing_actor_steps) :]))

    def describe(self, config: RLConfig) -> str:
        """The batch arithmetic in one line. Filtering makes a rollout of more prompts, so that there are fewer of them."""
        most = "at most " if config.dynamic_filtering else ""
        frozen = f", {most}{self.actor_updates} of the actor" if self.actor_updates < self.updates else ""
        return (
            f"{self.prompts[0]} prompts x {config.n_samples_per_prompt} samples = "
            f"{self.prompts[0] * config.n_samples_per_prompt} samples a rollout -> "
            f"{-(-self.prompts[0] * config.n_samples_per_prompt // config.train_batch_size) * config.max_epochs} updates of up to "
            f"{config.train_batch_size}; {most}{self.rollouts} rollouts, {most}{self.updates} updates in all{frozen}"
        )
