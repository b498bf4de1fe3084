"""The settings of togi iterate: what is refused, and the commands that its steps are. All without torch."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from inspect import getsource
from pathlib import Path
from textwrap import dedent

import pytest

from tests.source import trees
from togi.config.fields import Settings, is_later
from togi.config.infer import InferConfig, check_infer
from togi.config.iterate import IterateConfig, check_iterate
from togi.config.parse import parse
from togi.errors import CheckpointError, ConfigError, RunError
from togi.methods import check_method
from togi.methods.dpo import DPO
from togi.methods.sft import SFT
from togi.run.iterate import IterateState
from togi.run.iterate_steps import (
    GENERATION,
    MODEL,
    ON_BY_DEFAULT,
    PAIRS,
    REWARD_TEXT,
    TRAINING,
    Steps,
    _flags,
    subprocess_step,
)

ROOT = Path(__file__).parents[2]
NEEDED = "--pretrain m --prompt_data d.jsonl --run_dir r --reward_func f.py --method"


def config(flags: str) -> IterateConfig:
    """From the needed flags and more, or "METHOD without FLAG"."""
    method, *more = flags.split()
    words = [*NEEDED.split(), method, *more]
    if more[:1] == ["without"]:
        words = re.sub(rf"{more[1]} \S+ ", "", f"{NEEDED} {method}").split()
    parsed = parse(IterateConfig, words, "iterate")
    check_iterate(parsed)
    return parsed.config


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("rs without --pretrain", "--pretrain is required"),
        ("rs without --run_dir", "--run_dir is required"),
        ("best", "--method best: must be rs, dpo or csft"),
        ("rs --beta 0.2", "--beta belongs to --method dpo, but --method is rs"),
        ("dpo --csft_prompt 3", "--csft_prompt belongs to --method csft, but --method is dpo"),
        ("csft --ref_previous_round", "--ref_previous_round belongs to --method dpo"),
        ("rs --best_of_n 1", "--best_of_n 1 leaves --method rs nothing to choose from"),
        ("dpo --greedy_sampling", "--best_of_n 4 with --greedy_sampling would give the same output 4 times"),
        (
            "rs --rollout_engine transformers --enforce_eager",
            "--enforce_eager is vLLM's but --rollout_engine transformers",
        ),
        ("rs --normalize_reward", "--normalize_reward works on a reward model"),
        ("rs --reward_weights 1 2", "--reward_weights has 2 numbers for 1 rewards"),
        ("rs --reward_func builtin:sum", "--reward_func builtin:sum is not known"),
        ("rs --length_target 9", "--length_target and --reward_func builtin:length belong together"),
        ("rs --reward_combine mean", "--reward_combine mean needs several rewards"),
        ("rs --remote_rm_url host/x", "--remote_rm_url host/x: give the http:// or https:// address"),
        ("rs without --reward_func", "There is no reward"),
        ("rs --pretrain=", "--pretrain (no value): must be a path, not an empty text"),
        (
            "rs --reward_pretrain r --max_new_tokens 24 --prompt_max_len 40 --max_tokens_per_gpu 64",
            "--max_tokens_per_gpu 64 is not more than --prompt_max_len 40 + --max_new_tokens 24, which a reward model",
        ),
        ("rs --ref_reward_offload", "Unknown flag --ref_reward_offload"),
        ("rs --max_bad_rows 0.1", "Unknown flag --max_bad_rows"),
        ("rs --reward_func f.txt", "--reward_func f.txt must be a Python file"),
        ("csft --reward_template {input}", "--reward_template must contain"),
        ("rs --eval_dataset e --eval_temperature 0", "--eval_n_samples_per_prompt 4 with --eval_temperature 0"),
        ("rs --ds_tensor_parallel_size 2", "--ds_tensor_parallel_size needs several processes"),
        ("rs --fsdp_shard_size 2", "--fsdp_shard_size needs several processes"),
        ("rs --ring_attn_size 2", "--ring_attn_size and --ring_head_stride need several processes"),
        ("rs --apply_chat_template --input_template {}", "exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(flags)
    assert sentence in str(error.value)


def test_every_accepted_flag_is_read() -> None:
    """By name in the files of this command, in a property that they read, or handed to the command of a step."""
    accepted = {name for name in IterateConfig.model_fields if not is_later(IterateConfig, name)}
    files = ("iterate", "iterate_steps", "iterate_scores", "rewards")
    read = set[str]().union(*(attributes(trees()[f"run/{file}.py"]) for file in files))
    # A property is read, and so is what it reads in turn.
    methods = {
        name: attributes(ast.parse(dedent(getsource(method))))
        for base in IterateConfig.__mro__
        if issubclass(base, Settings)
        for name, each in vars(base).items()
        if callable(method := each.fget if isinstance(each, property) else each) and not name.startswith("_")
    }
    for _ in range(3):
        read |= set[str]().union(*(methods[name] for name in read & methods.keys()))
    handed = {*MODEL, *GENERATION, *TRAINING, *PAIRS, *REWARD_TEXT}
    assert accepted - read - handed == set()


def attributes(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("method", ["rs", "dpo", "csft"])
@pytest.mark.parametrize(
    "rendering", ["", "--apply_chat_template --tokenizer_chat_template {{x}}", "--input_template Q:{}"]
)
def test_each_step_is_a_sound_command(tmp_path: Path, method: str, rendering: str) -> None:
    """Their own parsers and checks take them, with the settings handed on."""
    commands: list[list[str]] = []
    tuned = "--top_p 0.9 --seed 5 --adam_betas 0.8 0.9 --no_packing_samples --gradient_checkpointing --bf16"
    tuned += " --lr_scheduler polynomial --lr_power 2 --adam_offload --no_enable_prefix_caching"
    words = f"{method} {rendering} {tuned} --eval_temperature 0.3"
    steps = Steps(config(words), tmp_path, lambda module, argv: commands.append(list(argv)))
    command, argv = steps.training_command(3, "now")
    kind = DPO if method == "dpo" else SFT
    parsed = parse(kind, argv, command)
    check_method(parsed)
    trained = parsed.config
    assert (trained.pretrain, trained.seed, trained.adam_betas) == ("now", 8, (0.8, 0.9))
    assert (trained.packing_samples, trained.gradient_checkpointing, trained.bf16) == (False, True, True)
    assert (trained.lr_power, trained.adam_offload) == (2, True)
    assert trained.learning_rate == (5e-7 if method == "dpo" else 2e-6)
    if isinstance(trained, DPO):
        assert trained.ref_pretrain == "m"  # the first model, in every round
        again = Steps(config(f"{words} --ref_previous_round"), tmp_path, print).training_command(3, "now")[1]
        assert parse(DPO, again, "dpo").config.ref_pretrain == "now"
    steps._ask(tmp_path, [{"input": "a"}], "now", 3, 4, 0.7, told=True)
    asked = parse(InferConfig, commands[0], "infer")
    check_infer(asked)
    assert (asked.config.top_p, asked.config.seed, asked.config.temperature) == (0.9, 8, 0.7)
    assert asked.config.enable_csft == (method == "csft")
    assert not asked.config.enable_prefix_caching


def test_a_step_is_done_once(tmp_path: Path) -> None:
    state = IterateState(tmp_path / "run", {"--seed": "1"})
    assert state.open() == 0
    assert state.once(1, "score", lambda: {"reward": 0.5}) == {"reward": 0.5}
    again = IterateState(tmp_path / "run", {"--seed": "1"})
    assert again.open() == 1
    assert again.once(1, "score", lambda: {"reward": 9.0}) == {"reward": 0.5}
    with pytest.raises(CheckpointError, match=r"other settings \(--seed was 1, is 2\)"):
        IterateState(tmp_path / "run", {"--seed": "2"}).open()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="not empty and holds no iteration"):
        IterateState(tmp_path / "full", {}).open()


def test_a_step_that_fails_stops_the_iteration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[1]).touch()\nsys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    subprocess_step("step", [str(tmp_path / "done"), "0"])
    assert (tmp_path / "done").exists()
    with pytest.raises(RunError, match="step ended with status 2"):
        subprocess_step("step", [str(tmp_path / "done"), "2"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to the life of its parent")
def test_a_step_does_not_outlive_a_killed_iteration(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    script = "from togi.run.iterate_steps import subprocess_step; subprocess_step('sleeper', [])"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while running(child):
        assert time.monotonic() < deadline, "the step goes on alone"
        time.sleep(0.01)


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie that nobody has collected yet."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_is_on_by_default_is_on_in_the_steps_too() -> None:
    """So that it need not be handed on, and no step announces what nobody asked for."""
    for names, command in (
        ((*MODEL, *TRAINING), DPO),
        ((*MODEL, *TRAINING), SFT),
        ((*MODEL, *GENERATION), InferConfig),
    ):
        fields = command.model_fields
        assert [name for name in names if name in ON_BY_DEFAULT and fields[name].default is not True] == []
    assert "flash_attn" in ON_BY_DEFAULT
    assert _flags({"flash_attn": True, "bf16": True, "packing_samples": False, "aux": None}) == [
        "--bf16",
        "--no_packing_samples",
    ]
