"""What is compared: the cases with their sizes, and the settings that a peer may choose from.

Sizes are small, so that five pairs of the five training cases take less than an hour on two cores with the 135M model; ``--steps``
and ``--rows`` change them. GRPO's lengths are equal in all rows, so that a padding peer loses nothing by padding there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from comparison.rows import Spread

TRL = "trl"


class Kind(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    RM = "rm"
    REPLAYED = "replayed"
    """GRPO on responses that are there already: scoring and update only."""
    GENERATED = "generated"
    """The whole step of GRPO or PPO."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``batch``: sequences (pairs) of one forward of a peer. ``options``: what else it is told; see ``peers``.

    ``same_precision``: float32 master weights. A setting without them may be measured, but is not compared with.
    """

    name: str
    batch: int
    options: Mapping[str, bool] = field(default_factory=dict)
    same_precision: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """``rows``: of one optimizer step (prompts, for RL). ``frozen``: forwards of frozen models on the same tokens.

    ``best``: the name of TRL's setting that is compared with where there was no sweep; other peers take its batch size.
    ``critic``: PPO's.
    """

    name: str
    kind: Kind
    prompt: Spread
    answer: Spread
    answers: int
    rows: int
    steps: int
    learning_rate: float
    frozen: int
    settings: tuple[Setting, ...]
    best: str
    peers: tuple[str, ...] = (TRL,)
    critic: bool = False

    @property
    def forwards(self) -> int:
        """What the step costs beside the update of the model, in forwards: a critic's values and update are worth four."""
        return self.frozen + (4 if self.critic else 0)

    @property
    def items(self) -> int:
        """What a peer's batch size counts, per optimizer step: rows, or responses."""
        return self.rows * self.answers if self.kind in (Kind.REPLAYED, Kind.GENERATED) else self.rows

    def best_of(self, peer: str, winner: str | None = None) -> Setting:
        """``winner``: of a sweep on this machine, if there was one."""
        best = self.setting(winner or self.best)
        return best if peer == TRL else Setting(f"batch{best.batch}", best.batch)

    def setting(self, name: str) -> Setting:
        return next(setting for setting in self.settings if setting.name == name)

    def choices(self, peer: str, processes: int) -> list[Setting]:
        """The settings of a peer whose batches divide a step. Options are TRL's."""
        return [
            setting
            for setting in self.settings
            if self.items % (setting.batch * processes) == 0 and (peer == TRL or not setting.options)
        ]


def batches(*sizes: int) -> tuple[Setting, ...]:
    return tuple(Setting(f"batch{size}", size) for size in sizes)


GSM8K_PROMPT, GSM8K_ANSWER = Spread(60, 0.35, 8, 256), Spread(126, 0.43, 16, 512)
PAIR_PROMPT, PAIR_ANSWER = Spread(155, 1.0, 8, 1024), Spread(170, 0.9, 4, 1024)
GROUP = 8
SFT_SETTINGS = (
    *batches(1, 2, 4, 8),
    Setting("compiled1", 1, {"compile": True}),
    Setting("padding_free4", 4, {"padding_free": True}),
    Setting("padding_free8", 8, {"padding_free": True}),
    Setting("pure_bf16", 4, {"pure_bf16": True}, same_precision=False),
)
PAIR_SETTINGS = (
    *batches(1, 2, 4),
    Setting("compiled1", 1, {"compile": True}),
    Setting("pure_bf16", 2, {"pure_bf16": True}, same_precision=False),
)
GROUP_SETTINGS = (
    *batches(1, 2, 4, 8),
    Setting("compiled4", 4, {"compile": True}),
    Setting("pure_bf16", 4, {"pure_bf16": True}, same_precision=False),
)
STEP_SETTINGS = (*batches(2, 4, 8), Setting("continuous4", 4, {"continuous_batching": True}))

CASES = {
    case.name: case
    for case in (
        Case(
            "sft",
            Kind.SFT,
            GSM8K_PROMPT,
            GSM8K_ANSWER,
            1,
            8,
            4,
            1e-5,
            0,
            SFT_SETTINGS,
            "batch1",
            (TRL, "transformers", "deepspeed"),
        ),
        Case("dpo", Kind.DPO, PAIR_PROMPT, PAIR_ANSWER, 2, 4, 4, 1e-6, 1, PAIR_SETTINGS, "batch1"),
        Case("rm", Kind.RM, PAIR_PROMPT, PAIR_ANSWER, 2, 4, 4, 1e-5, 0, PAIR_SETTINGS, "batch1"),
        Case("grpo128", Kind.REPLAYED, Spread(128), Spread(128), GROUP, 1, 4, 1e-6, 1, GROUP_SETTINGS, "batch4"),
        Case("grpo512", Kind.REPLAYED, Spread(512), Spread(128), GROUP, 1, 3, 1e-6, 1, GROUP_SETTINGS, "batch4"),
        Case("grpo_step", Kind.GENERATED, Spread(128), Spread(128), GROUP, 2, 4, 1e-6, 1, STEP_SETTINGS, "batch2"),
        Case("ppo", Kind.GENERATED, Spread(128), Spread(128), GROUP, 2, 4, 1e-6, 1, (), "", (), critic=True),
        Case("launch", Kind.SFT, Spread(16), Spread(16), 1, 8, 3, 1e-5, 0, batches(8), "batch8"),
    )
}
