"""What the Ray workers of ``test_rl_ring`` are: a module that they can import by its name."""

from __future__ import annotations

from togi.config.rl import RLConfig
from togi.plan.placement import Role
from togi.workers.model_worker import LearnerWorker, ScorerWorker


class Player(LearnerWorker):
    """A worker that plays one role after the other, since processes start slowly."""

    def start(
        self, rank: int, size: int, address: str, port: int, config: RLConfig, role: Role, last: int | str
    ) -> None:
        start = LearnerWorker.start if isinstance(last, int) else ScorerWorker.start
        start(self, rank, size, address, port, config, role, last)

    scores = ScorerWorker.scores

    def leave(self) -> None:
        self._world.leave()
