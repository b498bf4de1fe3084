"""The load-balancing loss: Transformers' own function on single sequences; packed = shared = one by one; its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.learn_tools import scheduled
from tests.packs import Group, plain_pack, random_groups, shared_pack
from tests.tiny import tiny_config, tiny_model
from togi.algo.balance import balance_loss, routing_sums
from togi.batch import Batch
from togi.config.architectures import MIXTURES
from togi.config.choices import Scheduler
from togi.learn.learner import Learner
from togi.learn.objective import SFTObjective
from togi.model.attention import SEGMENTS
from togi.model.policy import Needs, PolicyModel, ScalarModel
from togi.obs import names
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

GROUPS = random_groups(0, [(5, [4, 4, 6]), (3, [7]), (9, [2, 3])])
PATHS = [prompt + response for prompt, responses in GROUPS for response in responses]
SINGLE: list[Group] = [(prompt, [response]) for prompt, responses in GROUPS for response in responses]


def policy(arch: str) -> PolicyModel:
    hf = tiny_model(arch, dtype=torch.float64)
    hf.set_attn_implementation(SEGMENTS)
    hf.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return PolicyModel(hf).train()


def scalar(arch: str) -> ScalarModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(arch, num_labels=1, initializer_range=0.1)
        hf = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    hf.set_attn_implementation(SEGMENTS)
    hf.set_experts_implementation("eager")
    return ScalarModel(hf).train()


def theirs(model: PolicyModel | ScalarModel) -> list[Tensor]:
    """Transformers' function on the router logits of each sequence alone, through Transformers' own attention."""
    model.hf.set_attn_implementation("eager")
    losses = []
    for tokens in PATHS:
        body = model.hf.base_model(input_ids=torch.tensor([tokens]), use_cache=False, output_router_logits=True)
        losses.append(load_balancing_loss_func(body.router_logits, 4, 2))
    model.hf.set_attn_implementation(SEGMENTS)
    return losses


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        scale = float(second[name].abs().max()) + 1e-12
        torch.testing.assert_close(gradient / scale, second[name] / scale, rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("make", [policy, scalar])
@pytest.mark.parametrize("layout", [plain_pack, shared_pack])
def test_every_sequence_has_transformers_loss_and_its_gradient(arch, make, layout) -> None:
    model = make(arch)
    expected = theirs(model)
    weights = torch.linspace(0.5, 2.0, len(PATHS), dtype=torch.float64)
    sum(weight * loss for weight, loss in zip(weights, expected, strict=True)).backward()
    wanted = gradients(model)
    assert any("gate" in name and float(gradient.abs().max()) > 1e-3 for name, gradient in wanted.items())
    needs = Needs(logprobs=True, balance=True) if make is policy else Needs(scores=True, balance=True)
    outputs = model(layout(GROUPS), needs)
    torch.testing.assert_close(outputs.balance_N, torch.stack(expected).double(), rtol=1e-5, atol=1e-6)
    assert float(outputs.balance_N.detach().std()) > 1e-2, "sequences that all say the same prove nothing"
    # what is not in the sum must reach every parameter too, as in training
    rest = (outputs.logprobs_K if make is policy else outputs.scores_N).sum()
    ((weights * outputs.balance_N).sum() + 0 * rest).backward()
    found = {name: gradient for name, gradient in gradients(model).items() if name in wanted}
    assert_close(found, wanted)


def test_the_loss_by_hand() -> None:
    """Two layers, three experts, one choice a token: a shared prompt of one token and two continuations of one."""
    certain = 50.0 * torch.eye(3)
    layers = [certain[[0, 0, 1]], certain[[2, 2, 2]]]
    sums = routing_sums(layers, 1, torch.tensor([0, 1, 2]), 3)
    losses = balance_loss(sums, 1, torch.tensor([[1, 1, 0], [1, 0, 1]]))
    # sequence 1 chose experts 0, 0 and 2, 2: E (1/2 1/2 + 1/2 1/2); sequence 2 chose 0, 1 and 2, 2
    torch.testing.assert_close(losses, torch.tensor([3 * 0.5, 3 * (1 / 16 + 1 / 16 + 1 / 4)]))


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointed in (False, True):
        model = policy("mixtral")
        if checkpointed:
            model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = model(shared_pack(GROUPS), Needs(logprobs=True, balance=True))
        (outputs.balance_N.sum() + outputs.logprobs_K.sum()).backward()
        results.append(gradients(model))
    assert_close(*results, rtol=1e-12)


def step_gradients(batches: list[Batch], coef: float) -> tuple[dict[str, Tensor], float]:
    """The gradient of one optimizer step, seen before it is used, and the logged loss."""
    backend = trainable(policy("mixtral"), World.solo(torch.device("cpu")), BackendOptions(bf16=False))
    seen: dict[str, Tensor] = {}

    def look(_: float) -> None:
        seen.update(gradients(backend.module))

    backend.step = look
    learner = Learner(backend, SFTObjective(), scheduled(Scheduler.CONSTANT, 1.0, 1), math.inf, coef)
    return seen, learner.update(batches).metrics.get(names.AUX_LOSS, math.nan)


def test_the_learner_adds_a_mean_over_sequences_however_they_are_packed() -> None:
    """coef x mean over the step's sequences, beside a token mean: from Transformers' numbers, and in three layouts."""
    coef, model = 0.3, policy("mixtral")
    losses = theirs(model)
    (coef * sum(losses) / len(losses)).backward()
    aux = gradients(model)
    plain, nothing = step_gradients([plain_pack(GROUPS)], 0.0)
    assert math.isnan(nothing)
    layouts = ([plain_pack(GROUPS)], [shared_pack(GROUPS)], [plain_pack([single]) for single in SINGLE])
    for batches in layouts:
        found, logged = step_gradients(batches, coef)
        assert logged == pytest.approx(float(sum(losses)) / len(losses), rel=1e-6)
        assert_close(found, {name: plain[name] + aux.get(name, 0) for name in plain})


def test_a_batch_keeps_its_chains_on_any_layout() -> None:
    shared = shared_pack(GROUPS[:2])
    assert shared.segments_T().tolist() == [0] * 5 + [1] * 4 + [2] * 4 + [3] * 6 + [4] * 3 + [5] * 7
    assert shared.chains_NS().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert plain_pack(GROUPS).chains_NS().tolist() == torch.eye(6).tolist()
