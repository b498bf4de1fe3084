"""How often the host waits for the device in training.

The device is torch's "meta", whose tensors have no data: whatever asks for a number, or for a size that depends on one, raises.
Only copies to host memory are let through, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention_cases import TREE
from tests.learn_tools import critic, objective, packs, policy, rollouts, scheduled
from togi.batch import Batch
from togi.config.choices import Aggregation, PolicyLossType, Scheduler
from togi.learn.learner import Learner
from togi.learn.objective import Objective, PolicyObjective, SFTObjective, ValueObjective
from togi.learn.scorer import Scorer
from togi.methods.kd_objective import DistillationObjective
from togi.methods.kto_objective import KTOObjective
from togi.methods.preference import DPOObjective
from togi.methods.prm_objective import StepRewardObjective
from togi.model.attention import levels_of
from togi.parallel.process import World

META = torch.device("meta")
TEACHER = policy(seed=1).to(META)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The copies to host memory, by what asked for them. What arrives is zeros."""
    made: list[str] = []
    for name, arrive in (("cpu", lambda x: x), ("tolist", Tensor.tolist)):
        original = getattr(Tensor, name)

        def copy(self: Tensor, original=original, arrive=arrive, name=name) -> object:  # type: ignore[no-untyped-def]
            if self.device != META:
                return original(self)
            made.append(name)
            return arrive(torch.zeros(self.shape, dtype=self.dtype))

        monkeypatch.setattr(Tensor, name, copy)
    yield made


def batches() -> list[Batch]:
    """Four samples, which are two pairs too, or rows of two kinds."""
    samples = []
    for n, sample in enumerate(rollouts(4)):
        kinds = dict.fromkeys(("chosen", "desirable", "generated"), 1.0 - n % 2)
        values = {**sample.values, **kinds, "mismatched": 0.0, "kl_estimate": 0.1}
        labels = np.where(sample.loss_mask, 3.0 + n % 2, np.nan).astype(np.float32)
        samples.append(replace(sample, values=values, streams={**sample.streams, "labels": labels}))
    return packs(samples, [2, 2])


@pytest.mark.parametrize(
    ("loss", "each"),
    [
        (SFTObjective(), ["tolist", "cpu"]),
        (objective(), ["tolist", "tolist", "cpu"]),
        (PolicyObjective(0.2, 0.3, Aggregation.TOKEN_MEAN, PolicyLossType.GSPO), ["tolist", "tolist", "cpu"]),
        (ValueObjective(0.2), ["tolist"]),
        (DPOObjective(), ["tolist", "cpu"]),
        (KTOObjective(), ["tolist"] * 3 + ["cpu"]),
        (StepRewardObjective((3, 4)), ["tolist"]),
        (DistillationObjective(TEACHER, TEACHER.vocabulary), ["tolist"] * 3 + ["cpu"]),
    ],
)
def test_a_micro_batch_waits_for_its_metrics_and_log_probs_only(
    copies: list[str], loss: Objective, each: list[str]
) -> None:
    """Between forward and backward, and never inside of them. The first of them waits; the others have nothing to wait for."""
    model = (critic() if isinstance(loss, ValueObjective) else policy()).to(META)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(len(copies)))

    def backward(total: Tensor, last: bool) -> None:
        before = len(copies)
        total.backward()
        assert len(copies) == before

    backend = SimpleNamespace(module=model, world=World.solo(META), backward=backward)
    learner = Learner(backend, loss, scheduled(Scheduler.CONSTANT, 1.0, 1), 1.0)
    learner._accumulate(loss, batches(), 1.0, last=True)
    assert copies == each * 2
    assert forwards == [0, len(each)]
    assert all(p.grad is not None for p in model.parameters())


def test_a_mixture_of_experts_waits_for_one_metric_more(copies: list[str]) -> None:
    model = policy(dtype=torch.bfloat16, arch="mixtral").to(META)
    backend = SimpleNamespace(module=model, world=World.solo(META), backward=lambda total, last: total.backward())
    learner = Learner(backend, SFTObjective(), scheduled(Scheduler.CONSTANT, 1.0, 1), 1.0, aux_loss_coef=0.1)
    learner._accumulate(learner.objective, batches(), 1.0, balanced_over=4.0, last=True)
    assert copies == ["tolist", "cpu", "tolist"] * 2


def test_a_scorer_waits_for_results_only(copies: list[str]) -> None:
    arrays = Scorer(policy().to(META), World.solo(META)).logprobs(batches())
    assert len(arrays) == 4
    assert copies == ["cpu"] * 2
    Scorer(critic().to(META), World.solo(META)).scores(batches())
    assert copies == ["cpu"] * 2 + ["cpu"] * 2


class TwoRanks:
    """A ring of two without the other rank: what arrives is zeros."""

    rank, size = 0, 2

    def pass_on(self, block: Tensor, rows: int, channel: int) -> Callable[[], Tensor]:
        return lambda: block.new_zeros(rows, *block.shape[1:])

    def add_up(self, tensor: Tensor) -> None:
        pass


@pytest.mark.parametrize("loss", [SFTObjective(), ValueObjective(0.2)])
def test_a_ring_waits_no_more(copies: list[str], moves: list[bool], loss: Objective) -> None:
    """A rank counts its tokens on the host, where the batch came from; a window too is laid out there."""
    is_value = isinstance(loss, ValueObjective)
    model = critic() if is_value else policy(arch="mistral")
    model.hf.config.sliding_window = 3
    model.to(META).join_ring(TwoRanks(), 1)
    moves.clear()
    backend = SimpleNamespace(module=model, world=World.solo(META), backward=lambda total, last: total.backward())
    learner = Learner(backend, loss, scheduled(Scheduler.CONSTANT, 1.0, 1), 1.0)
    learner._accumulate(loss, batches(), 1.0, last=True)
    assert copies == (["tolist"] if is_value else ["tolist", "cpu"]) * 2
    assert moves and all(moves)


@pytest.mark.parametrize("window", [None, 2])
def test_the_tables_of_attention_travel_without_a_wait(moves: list[bool], window: int | None) -> None:
    levels = levels_of(TREE, window, META)
    assert len(levels) == (3 if window is None else 1)
    # bounds of queries and of keys, and the tokens of both, but all queries in their order, and all keys without a window
    assert moves == [True] * (2 * len(levels) + (4 if window is None else 1))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each copy to the device, whether it is from pinned memory, so that nothing waits for it."""
    made: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self.clone())
    original = Tensor.to

    def to(self: Tensor, *given: object, non_blocking: bool = False, **named: object) -> Tensor:
        if self.device != META and META in given:
            made.append(non_blocking)
        return original(self, *given, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(Tensor, "to", to)
    return made


def test_a_batch_travels_without_a_wait(moves: list[bool]) -> None:
    """Every tensor of it from pinned memory, and none of them at once."""
    batch = batches()[0]
    moved = batch.to(META)
    assert moves == [True] * (6 + len(batch.streams) + len(batch.values))
    targets = moved.targets_U, moved.picks_K, moved.target_sequences_K
    tensors = (moved.tokens_T, *targets, *moved.streams.values(), *moved.values.values())
    assert {x.device for x in tensors} == {META}
