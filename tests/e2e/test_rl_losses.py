"""Each switch of the policy loss reaches the update: loss and gradient of a run = a second computation from what it stored.

The rollouts are real, made by the Transformers engine; then their engine log-probs are moved, as by a faulty engine, and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests import policy_cases
from tests.rl_world import GRPO, HF, example, metrics, train

STEP = Path("rollouts/step_000001.parquet")
CLIP = f"--eps_clip_low_high {policy_cases.LOW} {policy_cases.HIGH}"
TRUST = f"--enable_vllm_is_correction --vllm_is_truncated_threshold {policy_cases.TRUST[0]} {policy_cases.TRUST[1]}"


@dataclass(frozen=True)
class Case:
    """A run by an example's script, or by the command itself, and what its loss should be."""

    script: str | None
    flags: str
    kind: str
    correction: str | None = None
    against_engine: bool = False
    entropy_coef: float = 0.0
    by_sequence: bool = False


CASES = {
    "gspo against the engine": Case(
        "rl_gspo.sh",
        f"--enable_vllm_is_correction --dual_clip {policy_cases.DUAL} --entropy_loss_coef 0.3 {CLIP}",
        "gspo",
        against_engine=True,
        entropy_coef=0.3,
        by_sequence=True,
    ),
    "ppo": Case("rl_replay.sh", CLIP, "ppo"),
    "cispo with icepop": Case("rl_cispo.sh", f"{TRUST} {CLIP}", "cispo", "icepop"),
    "preset grpo with tis": Case(
        None, f"--algo grpo --entropy_loss_coef 0.1 {TRUST} {CLIP}", "ppo", "tis", entropy_coef=0.1, by_sequence=True
    ),
}

EXAMPLES = {case.script for case in CASES.values() if case.script is not None}


@pytest.fixture(scope="module")
def moved(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stored engine log-probs were changed, by sequence and by token."""
    run = tmp_path_factory.mktemp("moved") / "run"
    train(world, run, *GRPO, *HF, "--max_steps", "1")
    table, rng = pq.read_table(run / STEP), np.random.default_rng(0)
    changed = [
        np.asarray(row, dtype=np.float32) + rng.normal(rng.normal(0, 0.1), 0.2, len(row)).astype(np.float32)
        for row in table["rollout_logprobs"].to_pylist()
    ]
    index = table.schema.get_field_index("rollout_logprobs")
    column = pa.array([row.tolist() for row in changed], table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), column), run / STEP)
    return run


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formulas(world: Path, moved: Path, tmp_path: Path, name: str) -> None:
    case, run = CASES[name], tmp_path / "run"
    flags = ["--replay", str(moved), "--max_steps", "1", *case.flags.split()]
    done = example(world, run, case.script, *flags, RUN=moved) if case.script else train(world, run, *GRPO, *flags)
    values = metrics(run)[0]["values"]
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float64, attn_implementation="eager")
    rows = [terms(model, row, case) for row in pq.read_table(run / STEP).to_pylist()]
    losses, entropies = [loss for loss, _ in rows], [entropy for _, entropy in rows]
    minimised = [loss - case.entropy_coef * entropy for loss, entropy in rows]
    total = torch.stack([row.mean() for row in minimised]).mean() if case.by_sequence else torch.cat(minimised).mean()
    total.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    assert values["policy/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4, abs=1e-6)
    assert values["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    assert values["policy/total_loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
    assert values["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert values["mismatch/mean_abs"] > 0.1  # reported raw, whatever is corrected
    if case.correction == "icepop":
        masked = torch.cat([loss == 0 for loss in losses]).double().mean().item()
        assert 0.1 < masked < 0.9
        assert values["mismatch/masked_share"] == pytest.approx(masked)
    if case.script is None:
        assert "--algo grpo sets --loss_aggregation sequence_mean" in done.stdout
        assert "--algo grpo" in (run / "config.yaml").read_text()


def terms(model: nn.Module, row: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    """Surrogate and entropy at each trained token of one stored rollout, from the weights before the update."""
    ids = torch.tensor(row["prompt_tokens"] + row["response_tokens"])
    full = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    places = torch.arange(len(row["prompt_tokens"]), len(ids))[torch.tensor(row["response_mask"])]
    own, engine = full[places - 1, ids[places]], torch.tensor(row["rollout_logprobs"], dtype=torch.float64)
    advantages = torch.tensor(row["advantages"], dtype=torch.float64)
    kept, weights = policy_cases.trust(case.correction, own.detach() - engine)
    surrogate = policy_cases.surrogate(case.kind, own, engine if case.against_engine else own.detach(), advantages)
    pairs = zip(kept, weights, surrogate, strict=True)
    loss = torch.stack([weight * term if keep else 0.0 * own[0] for keep, weight, term in pairs])
    return loss, -(full.exp() * full).sum(-1)[places - 1]
