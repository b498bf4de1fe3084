"""The moving average of a learner's weights: by hand over three steps, resumed, and of adapters only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learn_tools import CPU, learner, max_difference, packs, rollouts, solo, weights
from tests.tiny import save_tiny_model
from togi.config.shared import LoRA
from togi.learn.learner import Learner
from togi.learn.learner_state import Ema, load_learner, save_learner
from togi.model.loading import ModelSource, load_causal_lm
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

BETA = 0.75


def step(model: Learner, ema: Ema, number: int) -> None:
    model.update(packs(rollouts(4, seed=number), [3, 1]))
    ema.update()


def averages(ema: Ema) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ema.full_parameters()}


@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_by_hand(bf16: bool) -> None:
    """0.75^3 w0 + 0.25 (0.75^2 w1 + 0.75 w2 + w3), of the float32 masters: bfloat16 would lose such small differences."""
    model = solo(bf16=bf16)
    ema = Ema(model.backend, BETA, CPU)
    history = [weights(model.backend)]
    for number in range(3):
        step(model, ema, number)
        history.append(weights(model.backend))
    factors = (BETA**3, 0.25 * BETA**2, 0.25 * BETA, 0.25)
    expected = {
        name: sum(factor * each[name] for factor, each in zip(factors, history, strict=True)) for name in history[0]
    }
    assert max_difference(averages(ema), expected) < 1e-6
    assert all(tensor.dtype is torch.float32 for tensor in averages(ema).values())
    assert max_difference(averages(ema), history[-1]) > 1e-4


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Not the average of a run that began at the checkpoint."""
    model = solo()
    ema = Ema(model.backend, BETA, CPU)
    for number in range(2):
        step(model, ema, number)
    save_learner(model, tmp_path / "actor", {})
    ema.save(tmp_path / "ema")
    step(model, ema, 2)
    again = solo()
    average = Ema(again.backend, BETA, CPU)
    load_learner(again, tmp_path / "actor", {})
    average.load(tmp_path / "ema")
    step(again, average, 2)
    assert max_difference(averages(average), averages(ema)) == 0.0


def test_of_a_model_with_an_adapter_only_the_adapter_is_averaged(tmp_path: Path) -> None:
    lora = LoRA(4, 8, 0.0, ("q_proj",), load_in_4bit=False)
    hf = load_causal_lm(ModelSource(str(save_tiny_model(tmp_path)), torch.float32, lora=lora))
    model = learner(trainable(hf, World.solo(CPU), BackendOptions(bf16=False)), lr=1e-2)
    ema = Ema(model.backend, BETA, CPU)
    before = weights(model.backend)
    step(model, ema, 0)
    step(model, ema, 1)  # the first step has only moved B, which starts at zero
    after, average = weights(model.backend), averages(ema)
    assert average.keys() == after.keys()
    for name in average:
        if "lora" in name:
            assert float((average[name] - after[name]).abs().max()) > 1e-5
        else:
            assert torch.equal(average[name], before[name])
    assert [name for name, _ in ema.full_parameters(trained_only=True)] == [name for name in after if "lora" in name]
