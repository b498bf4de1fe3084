"""Online RL from Python with an estimator and a loss of one's own: ``python examples/hooks/train.py``.

MODEL and DATA in the environment choose the model and the prompts; without them those of examples/demo/prepare.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from median import median_baseline
from spo import spo

import togi

CACHE = Path(os.environ.get("TOGI_CACHE", Path.home() / ".cache" / "togi"))
OUT = Path(os.environ.get("OUT", "runs/hooks"))


def main() -> None:
    """Train, and say where the model is."""
    result = togi.rl(
        pretrain=os.environ.get("MODEL", CACHE / "smollm2-135m-instruct"),
        prompt_data=os.environ.get("DATA", CACHE / "demo-sums" / "train.jsonl"),
        input_key="prompt",
        label_key="answer",
        apply_chat_template=True,
        reward_func=Path(__file__).parents[1] / "rewards" / "math_reward.py",
        advantage_estimator=median_baseline,
        policy_loss_type=spo,
        rollout_engine="transformers",
        colocate_all_models=True,
        init_kl_coef=0,
        n_samples_per_prompt=4,
        rollout_batch_size=4,
        train_batch_size=8,
        prompt_max_len=128,
        generate_max_len=16,
        max_steps=int(os.environ.get("STEPS", "2")),
        run_dir=OUT,
        save_path=OUT / "model",
    )
    print(f"model: {result.model}")


if __name__ == "__main__":
    main()
