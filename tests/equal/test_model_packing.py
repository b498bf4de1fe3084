"""Packed = one by one, shared prefix = plain, checkpointed = not: outputs and gradients of all parameters.

The references are Transformers' own forwards with its own attention and a plain log-softmax. Weights are float64; RMS
norms and rotary tables compute in float32 inside these models, so equality is to about 1e-6, not 1e-15.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.attention_cases import DENSE
from tests.packs import (
    GROUPS,
    NEEDS,
    TEMPERATURE,
    Group,
    gradients,
    loss_of,
    packed,
    plain_pack,
    random_groups,
    shared_pack,
)
from tests.tiny import tiny_model
from togi.config.architectures import ARCHITECTURES, MIXTURES
from togi.model.attention import SEGMENTS
from togi.model.loading import ModelSource, load_causal_lm
from togi.model.policy import PolicyModel
from togi.model.support import logit_transform

CACHED_MODEL = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser() / "smollm2-135m-instruct"


def policy(arch: str, attention: str = SEGMENTS, **overrides: object) -> PolicyModel:
    hf = tiny_model(arch, dtype=torch.float64, **overrides)
    hf.set_attn_implementation(attention)
    if arch in MIXTURES:
        hf.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return PolicyModel(hf, logit_transform(hf.config)).train()


def one_by_one(model: PolicyModel, groups: list[Group]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Transformers' own forward, attention and logits, one sequence at a time."""
    model.hf.set_attn_implementation("eager")
    logprobs, entropies = [], []
    for prompt, responses in groups:
        for response in responses:
            tokens = torch.tensor([prompt + response])
            logits = model.hf(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logp_LV = logits.log_softmax(-1)
            logprobs.append(logp_LV.gather(1, torch.tensor(response)[:, None])[:, 0])
            entropies.append(-(logp_LV.exp() * logp_LV).sum(-1))
    logprobs_K, entropy_K = torch.cat(logprobs), torch.cat(entropies)
    loss_of(logprobs_K, entropy_K).backward()
    return logprobs_K.detach(), entropy_K.detach(), gradients(model)


def assert_same(one, other, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=atol)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        scale = float(other[2][name].abs().max()) + 1e-12
        torch.testing.assert_close(gradient / scale, other[2][name] / scale, rtol=rtol, atol=10 * atol, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", [plain_pack, shared_pack])
def test_packed_equals_transformers_one_by_one(arch, layout):
    model = policy(arch)
    result = packed(model, layout(GROUPS))
    assert_same(result, one_by_one(model, GROUPS))
    assert float(result[0].std()) > 0.1, "a model that says the same everywhere proves nothing"


@pytest.mark.parametrize("layout", [plain_pack, shared_pack])
def test_mistral_with_a_sliding_window_shorter_than_the_sequences(layout):
    model = policy("mistral", sliding_window=5)
    assert_same(packed(model, layout(GROUPS)), one_by_one(model, GROUPS))


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_segments_equal_the_dense_reference(arch):
    batch = shared_pack(GROUPS)
    assert_same(packed(policy(arch, SEGMENTS), batch), packed(policy(arch, DENSE), batch), rtol=1e-6, atol=1e-6)


def test_a_sequence_does_not_see_its_neighbours():
    model = policy("llama").eval()
    (prompt, responses), *rest = GROUPS
    with torch.no_grad():
        before = model(shared_pack([(prompt, responses), *rest]), NEEDS).logprobs_K
        changed = [[(token + 1) % 256 for token in responses[0]], *responses[1:]]
        after = model(shared_pack([(prompt, changed), *rest]), NEEDS).logprobs_K
    assert not torch.equal(before[:4], after[:4])
    # only one row of the head's product can differ in its place within a block, hence not bit-equal
    torch.testing.assert_close(before[4:], after[4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    batch, plain, checkpointed = shared_pack(GROUPS), policy("llama"), policy("llama")
    checkpointed.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert checkpointed.hf.is_gradient_checkpointing
    assert_same(packed(checkpointed, batch), packed(plain, batch), rtol=0, atol=1e-15)


def test_a_batch_without_targets_gives_zero_gradients_for_every_parameter():
    batch, model = plain_pack([([1, 2, 3], [[]])]), policy("llama")
    outputs = model(batch, NEEDS)
    assert outputs.logprobs_K.shape == (0,)
    (outputs.logprobs_K.sum() + outputs.entropy_K.sum()).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(float(gradient.abs().max()) == 0.0 for gradient in found.values())


@pytest.mark.skipif(not CACHED_MODEL.is_dir(), reason=f"the real model is not in {CACHED_MODEL} (set TOGI_CACHE)")
def test_the_real_model_packed_equals_unpacked():
    model = load_causal_lm(ModelSource(str(CACHED_MODEL), torch.float32)).eval()
    groups = random_groups(1, [(12, [10, 10]), (7, [20])], vocab=40_000)
    with torch.no_grad():
        shared = model(shared_pack(groups), NEEDS, TEMPERATURE)
        logprobs, entropies = [], []
        for prompt, responses in groups:
            for response in responses:
                alone = model(plain_pack([(prompt, [response])]), NEEDS, TEMPERATURE)
                logprobs.append(alone.logprobs_K)
                entropies.append(alone.entropy_K)
    torch.testing.assert_close(shared.logprobs_K, torch.cat(logprobs), rtol=0, atol=2e-4)
    torch.testing.assert_close(shared.entropy_K, torch.cat(entropies), rtol=0, atol=2e-4)
