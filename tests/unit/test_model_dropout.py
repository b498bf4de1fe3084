"""No dropout in training, whatever a model's configuration calls it: then a forward in training is the forward of evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DbrxConfig, OPTConfig

from tests.tiny import save_tiny_model
from togi.config.shared import LoRA
from togi.model import layers
from togi.model.loading import ModelSource, check_causal_lm, load_causal_lm, load_scalar_model
from togi.model.policy import Needs
from togi.model.support import _probe_batch

RATES: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.2, "resid_pdrop": 0.3},
    "phi": {"attention_dropout": 0.1, "embd_pdrop": 0.2, "resid_pdrop": 0.3},
    "opt": {"attention_dropout": 0.1, "dropout": 0.2, "layerdrop": 0.3},
    "gpt_neox": {"attention_dropout": 0.1, "hidden_dropout": 0.2},
    "llama": {"attention_dropout": 0.1},
    "mixtral": {"attention_dropout": 0.1, "router_jitter_noise": 0.2},
}


@pytest.mark.parametrize("arch", RATES)
def test_a_forward_in_training_is_that_of_evaluation(
    tmp_path: Path, arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Log-probs are equal bit for bit, so ratios are 1 and DPO's margin is 0. It is said, and the adapter's own rate stays."""
    more = {"word_embed_proj_dim": 64, "ffn_dim": 96} if arch == "opt" else {}
    folder = save_tiny_model(tmp_path / arch, arch, **RATES[arch], **more)
    written = json.loads((folder / "config.json").read_text())
    assert {key: written[key] for key in RATES[arch]} == RATES[arch]
    with caplog.at_level(logging.WARNING):
        check_causal_lm(str(folder), flash_attn=False)
    told = ", ".join(f"{key} {rate}" for key, rate in sorted(RATES[arch].items()))
    assert caplog.messages == [
        f"{folder}: dropout is off in training ({told} in its config.json, 0 in that of the trained model)"
    ]
    model = load_causal_lm(ModelSource(str(folder), torch.float32))
    batch, needs = _probe_batch(300), Needs(logprobs=True)
    with torch.no_grad():
        assert model.training
        in_training = model(batch, needs).logprobs_K
        in_evaluation = model.eval()(batch, needs).logprobs_K
    assert torch.equal(in_training, in_evaluation)
    assert all(getattr(model.hf.config, key) == 0 for key in RATES[arch])


def test_a_reward_model_too(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "gpt2", **RATES["gpt2"])
    model = load_scalar_model(ModelSource(str(folder), torch.float32), init_head=True)
    with torch.no_grad():
        scores = [model.train(training)(_probe_batch(300), Needs(scores=True)).scores_N for training in (True, False)]
    assert torch.equal(*scores)


def test_the_adapters_own_dropout_stays(tmp_path: Path) -> None:
    lora = LoRA(4, 8, 0.5, ("all-linear",), False)
    model = load_causal_lm(ModelSource(str(save_tiny_model(tmp_path)), torch.float32, lora=lora))
    rates = {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)}
    assert rates == {0.5}


def test_keys_of_parts_and_of_other_heads() -> None:
    """Nested keys are told with their part. Rates of heads that no model here has are left as they are."""
    nested = DbrxConfig(attn_config={"attn_pdrop": 0.1})
    assert layers.switch_off(nested) == {"attn_config.attn_pdrop": 0.1}
    assert nested.attn_config.attn_pdrop == 0
    other = OPTConfig(dropout=0.0, classifier_dropout=0.1, num_dropped=3, use_dropout=True)
    assert layers.switch_off(other) == {}
    assert other.classifier_dropout == 0.1


def test_a_module_with_a_rate_of_its_own() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout1d(0.2)))
    layers.remove_fixed(model)
    ones = torch.ones(1, 4, 8)
    assert torch.equal(model.train()(ones), ones)
