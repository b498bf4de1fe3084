"""What the Ray workers of ``test_rl_ring`` are: a module that they can import by its name."""

from __future__ import annotations

from togi.config.rl import RLConfig
from togi.plan.placement import Role
from togi.weights.carriers import Rendezvous
from togi.workers.model_worker import ScorerWorker
from togi.workers.ray.cluster import LearnerActor


class Player(LearnerActor):
    """A worker that plays one role after the other, since processes start slowly."""

    def start(self, meeting: Rendezvous, config: RLConfig, role: Role, last: int | str) -> None:
        start = LearnerActor.start if isinstance(last, int) else ScorerWorker.start
        start(self, meeting, config, role, last)

    scores = ScorerWorker.scores

    def leave(self) -> None:
        self._world.leave()
