"""The Transformers engine beside the scorer, and whole commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gpu.tools import Bounds, Figures, need_package

ROOT = Path(__file__).parents[2]
BOUNDS = {"float32": 2e-3, "bfloat16": 0.25}
"""On the difference of log-probs between engine and scorer, in nats. In bfloat16 they round differently."""


def engine(device: torch.device, small: bool) -> Figures:
    """64 prompts through the Transformers engine; the log-probs of what it sampled, from the scorer."""
    from tests.tiny import save_tiny_model

    bounds = Bounds()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder), num_attention_heads=4, num_key_value_heads=2)
        for dtype, bound in BOUNDS.items():
            differences, seconds = _differences(folder, dtype, device, 8 if small else 64)
            yield f"{dtype}: s", seconds
            yield f"{dtype}: mean difference", float(differences.mean())
            yield f"{dtype}: largest difference", float(differences.max())
            bounds.hold(dtype, float(differences.max()), bound)
    bounds.check()


def _differences(folder: str, dtype: str, device: torch.device, prompts: int) -> tuple[np.ndarray, float]:
    """Of each token, and the seconds of generating."""
    from togi.data.packing import pack
    from togi.learn.scorer import Scorer
    from togi.model.loading import ModelSource, load_causal_lm
    from togi.parallel import frozen
    from togi.parallel.backend import BackendOptions
    from togi.parallel.process import World
    from togi.rollout.engine import EngineSettings
    from togi.rollout.transformers_engine import TransformersCore
    from togi.sample import Sample, Sampling

    core = TransformersCore(EngineSettings(folder, "bfloat16" if dtype == "bfloat16" else "float32"))
    rng = np.random.default_rng(0)
    asked = {key: tuple(rng.integers(0, 256, rng.integers(3, 20)).tolist()) for key in range(prompts)}
    for key, prompt in asked.items():
        core.add(key, prompt, Sampling(max_tokens=16, ignore_eos=True, seed=key))
    start, done = time.perf_counter(), {}
    while len(done) < prompts:
        done |= core.step()
    seconds = time.perf_counter() - start
    core.close()
    samples = []
    for key, prompt in asked.items():
        tokens = np.array([*prompt, *done[key].tokens])
        samples.append(Sample(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), str(key)))
    bf16 = dtype == "bfloat16"
    source = ModelSource(folder, torch.bfloat16 if bf16 else torch.float32, flash_attn=bf16 and device.type == "cuda")
    model = load_causal_lm(source)
    world = World.solo(device)
    around = frozen(model, world, BackendOptions(bf16=bf16))
    scored = Scorer(model, world, around).logprobs([pack(samples, share_prefix=False)])
    found = np.concatenate([np.array(done[key].logprobs) for key in asked])
    return np.abs(found - np.concatenate(scored)), seconds


def commands(device: torch.device, small: bool) -> Figures:
    """Two steps of ``togi rl`` on one device, in one process and, where Ray is, in processes of their own; ``togi sft``."""
    for package in ("datasets", "plotly"):  # a command in its own process could only fail
        need_package(package)
    from tests import offline_world, rl_world

    with tempfile.TemporaryDirectory() as folder:
        rows, prompts = Path(folder) / "rows", Path(folder) / "prompts"
        for world in (rows, prompts):
            world.mkdir()
        offline_world.make_world(rows)
        sft = [sys.executable, "-m", "togi", "sft", *offline_world.flags(rows, "sft", rows / "run")]
        yield "togi sft: s", _timed(sft)
        rl_world.make_rl_world(prompts)
        shared = [*rl_world.GRPO, *rl_world.HF, "--colocate_all_models", "--max_steps", "2"]
        kinds = ["local", *(["ray"] if importlib.util.find_spec("ray") is not None else [])]
        for kind in kinds:
            run = Path(folder) / kind
            yield f"togi rl, workers {kind}: s", _timed(rl_world.command(prompts, run, *shared, "--workers", kind))
            steps = rl_world.metrics(run)
            assert len(steps) >= 2, f"{len(steps)} steps"
            yield f"togi rl, workers {kind}: steps", len(steps)
        if "ray" not in kinds:
            yield "togi rl, workers ray", "needs the package ray"


def _timed(command: list[str]) -> float:
    """Seconds of a command that must succeed. It sees nothing of the network."""
    start = time.perf_counter()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, flush=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert done.returncode == 0, f"exit status {done.returncode}: {lines[-1] if lines else 'it said nothing'}"
    return time.perf_counter() - start
