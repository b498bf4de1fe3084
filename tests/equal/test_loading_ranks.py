"""Models read part by part on several ranks = models read at once; and no rank ever holds more than its shards and one part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.equal import loading_jobs as jobs
from tests.learn_tools import CPU, max_difference, packs, rollouts, run_ranks
from tests.tiny import save_tiny_model, tiny_config
from togi.errors import ModelError
from togi.learn.scorer import Scorer
from togi.model.loading import ModelSource, load_causal_lm, load_scalar_model
from togi.parallel.process import World

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    save_tiny_model(folder / "llama", num_hidden_layers=12, **HEADS)
    save_tiny_model(folder / "qwen3_tied", "qwen3", tie_word_embeddings=True)
    for arch in ("gemma3_text", "mixtral", "qwen3_moe"):
        save_tiny_model(folder / arch, arch)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1)).save_pretrained(folder / "scalar")
    run_ranks(jobs.two_ranks, 2, folder)
    run_ranks(jobs.four_ranks, 4, folder)
    return folder


CASES = [
    *((False, name, 2, 1) for name in jobs.POLICIES),
    *((True, name, 2, 1) for name in jobs.SCALARS),
    (False, "llama", 2, 2),
    (False, "llama", 4, 1),
]


@pytest.mark.parametrize(("scalar", "name", "ranks", "tensor_size"), CASES)
def test_weights_and_results_equal_those_of_a_model_read_at_once(
    runs: Path, scalar: bool, name: str, ranks: int, tensor_size: int
) -> None:
    """Bit for bit: fused experts, tied heads, heads drawn anew; and what is saved has the names and values of the source."""
    alone = jobs.load(runs, name, scalar=scalar, defer=False)
    plain = {key: parameter.detach() for key, parameter in alone.named_parameters()}
    scorer, batches = Scorer(alone, World.solo(CPU)), packs(rollouts(4), [4])
    expected = scorer.scores(batches) if scalar else scorer.logprobs(batches)
    kind = "scalar" if scalar else "policy"
    for rank in range(ranks):
        result = torch.load(runs / f"{kind}_{name}_{ranks}_{tensor_size}_{rank}.pt", weights_only=False)
        assert max_difference(result["weights"], plain) == 0.0
        for ours, theirs in zip(result["results"], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    saved, source = (jobs.saved_tensors(f) for f in (runs / "saved" / f"{kind}_{name}_{tensor_size}", runs / name))
    if name == "llama" and scalar:
        source = {key: tensor for key, tensor in source.items() if key != "lm_head.weight"}
        source["score.weight"] = plain["hf.score.weight"]
    assert max_difference(saved, source) == 0.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_ever_holds_the_model(runs: Path, ranks: int) -> None:
    """Just after a part was read: the shards of those before and this one, whole. Twelve blocks of a 14th each, about."""
    for rank in range(ranks):
        result = torch.load(runs / f"policy_llama_{ranks}_1_{rank}.pt", weights_only=False)
        held, total = result["held"], result["total"]
        assert len(held) == 2 * (12 + 1) + 1
        assert held[0] == 0
        assert held[1] < 0.1 * total  # one block
        assert max(held) < total / ranks + 0.15 * total  # embedding and head together are the largest part
        assert held[-1] < 1.05 * total / ranks


def test_weights_that_groups_split_are_not_kept_whole(runs: Path) -> None:
    held = torch.load(runs / "policy_llama_2_2_0.pt", weights_only=False)["held"]
    total = torch.load(runs / "policy_llama_2_2_0.pt", weights_only=False)["total"]
    assert max(held) < 0.65 * total
    assert held[-1] < 0.55 * total


def test_a_checkpoint_that_lacks_weights_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    with pytest.raises(ModelError, match=r"has no score.weight, which would be random: give one with a head"):
        load_scalar_model(ModelSource(str(tmp_path), torch.float32, defer=True))


def test_reading_all_at_once_works_too(tmp_path: Path) -> None:
    """One process that was told to wait reads the whole model in one go; generation settings come along."""
    save_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    model = load_causal_lm(ModelSource(str(tmp_path), torch.float32, defer=True))
    model.read(model)
    plain = load_causal_lm(ModelSource(str(tmp_path), torch.float32))
    assert max_difference(dict(model.named_parameters()), dict(plain.named_parameters())) == 0.0
    assert model.hf.generation_config.temperature == plain.hf.generation_config.temperature == 0.25
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
