"""A folder with what a run of reinforcement learning needs, and ways to start one and to read what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import warm
from tests.example_scripts import run_script
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
REWARD = """
def reward_func(queries, prompts, labels):
    # arbitrary but spread out: the responses of a group hardly ever have equal rewards, so every step has a gradient
    answers = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    return [sum(map(ord, answer + label)) % 97 / 97 for answer, label in zip(answers, labels)]
"""


def make_rl_world(folder: Path) -> Path:
    """A tiny model, ten prompts and a reward function."""
    save_tiny_model(folder / "model", arch="llama", seed=0, num_attention_heads=4, num_key_value_heads=2)
    rows = [{"prompt": f"write number {i}", "letter": "e"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(world: Path, run: Path, *flags: str) -> list[str]:
    paths = ["--run_dir", run, "--save_path", run / "model", "--ckpt_path", run / "checkpoints"]
    fixed = [
        "--pretrain",
        world / "model",
        "--prompt_data",
        world / "prompts.jsonl",
        "--reward_func",
        world / "reward.py",
    ]
    sizes = (
        "--rollout_batch_size 4 --n_samples_per_prompt 4 --train_batch_size 16 --prompt_max_len 64 --generate_max_len 8"
    )
    keys = "--input_key prompt --label_key letter --apply_chat_template --actor_learning_rate 1e-3"
    words = [sys.executable, "-m", "togi.cli.train_ppo_ray", *fixed, *paths, *sizes.split(), *keys.split(), *flags]
    return [str(word) for word in words]


def train(world: Path, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = warm.run(command(world, run, *flags))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


GRPO = ["--advantage_estimator", "group_norm", "--init_kl_coef", "0"]
HF = ["--rollout_engine", "transformers"]


def loads_in_a_plain_script(model: Path) -> None:
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert t.chat_template; assert torch.isfinite(m(**t('abc', return_tensors='pt')).logits).all()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def has_steps(run: Path) -> bool:
    """Whether a run has logged anything: it is in its loop."""
    file = run / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def model_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


SIZES = "--rollout_batch_size 4 --n_samples_per_prompt 4 --train_batch_size 16 --prompt_max_len 64 --generate_max_len 8"


def example(world: Path, run: Path, script: str, *flags: str, **more: Path) -> subprocess.CompletedProcess[str]:
    """An example's script on the tiny world, in float32."""
    places = {"MODEL": world / "model", "DATA": world / "prompts.jsonl", "REWARD": world / "reward.py", "OUT": run}
    return run_script(script, *SIZES.split(), "--no_bf16", *flags, LABEL_KEY="letter", **places, **more)
