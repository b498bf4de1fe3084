"""Checks before anything heavy starts, where a whole command would be too long a way: see also tests/e2e/test_bad_inputs.py."""

from __future__ import annotations

import ast
import json
import re
import shutil
from inspect import getsource
from pathlib import Path
from textwrap import dedent

import pytest

from togi.config.choices import BackendName
from togi.config.parse import Parsed, parse
from togi.config.rl import RLConfig
from togi.errors import ConfigError, DataError, RewardError
from togi.methods import METHODS
from togi.obs.run_dir import Resolved, RunDirectory
from togi.parallel.backend import BackendOptions
from togi.plan.machine import Machine
from togi.pump.experience import GroupFilter
from togi.reward.scores import LengthPenalties
from togi.run import preflight

MACHINE = Machine(cpus=2, memory_bytes=0, gpus=0)


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command without a mistake, in an empty working folder."""
    model = tmp_path / "files" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    (model / "model.safetensors").touch()
    (tmp_path / "files" / "p.jsonl").write_text('{"input": "a", "label": "b"}\n')
    (tmp_path / "files" / "r.py").write_text("def reward_func(queries, prompts, labels): ...\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    files = tmp_path / "files"
    words = f"--pretrain {model} --prompt_data {files}/p.jsonl --reward_func {files}/r.py --rollout_engine transformers"
    return words.split()


def check(*flags: str, machine: Machine = MACHINE) -> Parsed[RLConfig]:
    return preflight.check(parse(RLConfig, flags, "rl"), machine, reward_given=False)


def test_a_sound_command_passes_resolved_and_leaves_nothing(flags: list[str]) -> None:
    config = check(*flags).config
    assert (config.vllm_num_engines, config.actor_num_gpus_per_node, config.critic_num_gpus_per_node) == (1, 1, 1)
    assert list(Path().iterdir()) == []


def test_gpus_of_this_machine_count_only_without_a_cluster(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    two = Machine(cpus=2, memory_bytes=0, gpus=2)
    asked = [
        *flags,
        "--actor_num_gpus_per_node",
        "4",
        "--critic_num_gpus_per_node",
        "1",
        "--ref_num_gpus_per_node",
        "1",
    ]
    with pytest.raises(ConfigError, match=r"engine 1 \+ actor 4 \+ critic 1 \+ ref 1 = 7 GPUs but the cluster has 2"):
        check(*asked, "--vllm_num_engines", "1", machine=two)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check(*asked, "--vllm_num_engines", "1", machine=two).config.actor_num_gpus_per_node == 4
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match="RAY_ADDRESS nonsense must be host:port"):
        check(*asked, machine=two)


@pytest.mark.parametrize(
    ("processes", "sentence"),
    [("4", ""), (None, "start with torchrun --nproc_per_node 2"), ("3", "--fsdp_shard_size 2 does not divide the 3")],
)
def test_groups_of_shards_divide_the_processes(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, sentence: str
) -> None:
    if processes is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", processes)
    config = parse(METHODS["sft"], ["--fsdp_shard_size", "2"], "sft").config
    assert BackendOptions.of(config).fsdp_shard_size == 2
    if not sentence:
        preflight.check_teams(config)
    else:
        with pytest.raises(ConfigError, match=sentence):
            preflight.check_teams(config)


def test_an_engine_of_several_processes_divides_the_attention_heads(flags: list[str]) -> None:
    (Path(flags[1]) / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    vllm = [*flags[:-1], "vllm"]
    check(*vllm, "--vllm_tensor_parallel_size", "3")
    with pytest.raises(ConfigError, match="--vllm_tensor_parallel_size 4 does not divide the 6 attention heads"):
        check(*vllm, "--vllm_tensor_parallel_size", "4")


def test_the_context_must_fit_the_model(flags: list[str]) -> None:
    file = Path(flags[1]) / "config.json"
    check(*flags)  # 1024 + 1024 are exactly the 2048 positions
    with pytest.raises(
        ConfigError, match=r"^--prompt_max_len 1025 \+ --generate_max_len 1024 is more than the 2048 pos"
    ):
        check(*flags, "--prompt_max_len", "1025")
    with pytest.raises(ConfigError, match=r"^--max_len 4096 is more than the 2048 positions"):
        check(*flags, "--max_len", "4096")
    file.write_text(json.dumps({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn"}}))
    check(*flags)
    file.write_text(json.dumps({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default"}}))
    with pytest.raises(ConfigError, match="512 positions"):
        check(*flags)
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        check(*flags)


@pytest.mark.parametrize("name", ["", "two words", "a/b/c", "./a", "/a", "~nobody/x", "a/", "-a"])
def test_what_cannot_be_a_model(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--pretrain .*is not a folder"):
        preflight.check_model("pretrain", name)


def test_the_weights_of_an_adapter_are_not_those_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError) as error:
        preflight.check_model("pretrain", str(tmp_path))
    assert (
        str(error.value)
        == f"--pretrain {tmp_path} has no weights (*.safetensors, *.bin): give a complete model folder."
    )
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ConfigError) as error:
        preflight.check_model("pretrain", str(tmp_path))
    merge = "merge it into its base with togi merge-lora first."
    assert str(error.value) == f"--pretrain {tmp_path} is a LoRA adapter, not a model: {merge}"
    preflight.check_model("pretrain", str(tmp_path), adapters=True)
    (tmp_path / "model.safetensors").touch()
    preflight.check_model("pretrain", str(tmp_path))


def test_hub_names_pass_unless_the_hub_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    preflight.check_model("pretrain", "owner/some-model_1.5b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match="--critic_pretrain owner/some-model is neither a folder nor in the hub cache"
    ):
        preflight.check_model("critic_pretrain", "owner/some-model")
    saved = tmp_path / "models--owner--some-model"
    (saved / "refs").mkdir(parents=True)
    (saved / "refs" / "main").write_text("abc")
    (saved / "snapshots" / "abc").mkdir(parents=True)
    (saved / "snapshots" / "abc" / "config.json").write_text("{}")
    preflight.check_model("critic_pretrain", "owner/some-model")


@pytest.mark.parametrize(
    "code",
    [
        "async def reward_func(queries, prompts, labels): ...",
        "import math as reward_func",
        "from rewards import *",
        "from rewards import score as reward_func",
        "reward_func: object = print",
        "if True:\n    reward_func = print",
    ],
)
def test_every_way_to_define_a_reward_passes(tmp_path: Path, code: str) -> None:
    (tmp_path / "r.py").write_text(code)
    preflight.check_reward_file(tmp_path / "r.py")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "but defines nothing: add it"),
        (b"def b(): ...\na = 1\n", "but defines 'a', 'b': add it, or rename"),
        (b"x = '\xff'\n", "has a syntax error in line|is not Python text"),
        (b"x = 1\0", "is not Python text|has a syntax error"),
    ],
)
def test_reward_files_that_cannot_work(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.py").write_bytes(content)
    with pytest.raises(RewardError, match=message) as error:
        preflight.check_reward_file(tmp_path / "r.py")
    assert "\n" not in str(error.value)


def test_a_saved_set_with_broken_state(flags: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    for text in ("{", "{}", '{"_data_files": 3}'):
        (saved / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"--eval_dataset: .*state.json cannot be read"):
            check(*flags, "--eval_dataset", str(saved))


def test_folders_below_a_file(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "work" / "runs").touch()
    with pytest.raises(ConfigError, match=r"--run_dir runs: .*runs is a file"):
        check(*flags)
    check(*flags, "--run_dir", "elsewhere")


def test_no_output_replaces_a_model_that_the_run_reads(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tmp_path / "files" / "model", tmp_path / "files" / "other_critic"
    shutil.copytree(model, other)
    (tmp_path / "link").symlink_to(model)
    named, critic = str(other).removesuffix("_critic"), ["--save_value_network", "--critic_pretrain", str(other)]
    for more, words in (
        (["--save_path", str(model)], f"save_path {model} would replace --pretrain {model}"),
        (["--ckpt_path", str(model)], f"ckpt_path {model} would replace --pretrain {model}"),
        (["--save_path", f"{tmp_path}/link"], f"save_path {tmp_path}/link would replace --pretrain {model}"),
        (["--save_path", named, *critic], f"save_path {other} would replace --critic_pretrain {other}"),
        (
            ["--save_path", str(other), "--reward_pretrain", str(other)],
            f"{other} would replace --reward_pretrain {other}",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"{words}: give another folder.")):
            check(*flags, *more)
    # The default folders, and a command on fixed data.
    monkeypatch.chdir(tmp_path / "files")
    shutil.copytree(model, "ckpt/checkpoints/best")
    shutil.copytree(model, "teacher")
    Path("s.jsonl").write_text('{"input": "a", "output": "b"}\n')
    keys = "--dataset s.jsonl --output_key output"
    for words, target in (
        (
            "--pretrain ckpt/checkpoints/best --teacher_model model",
            "./ckpt would replace --pretrain ckpt/checkpoints/best",
        ),
        (
            "--pretrain model --teacher_model teacher --save_path teacher",
            "teacher would replace --teacher_model teacher",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"--save_path {target}: give another folder.")):
            preflight.check_offline(parse(METHODS["kd"], f"{words} {keys}".split(), "kd"))


def sft(tmp_path: Path, *flags: str) -> None:
    (tmp_path / "files" / "s.jsonl").write_text('{"q": "a", "a": "b"}\n')
    words = f"--pretrain {tmp_path}/files/model --dataset {tmp_path}/files/s.jsonl --input_key q --output_key a".split()
    preflight.check_offline(parse(METHODS["sft"], [*words, *flags], "sft"))


@pytest.mark.parametrize("left", ["step_00000012", "best"])
def test_a_new_run_keeps_out_of_the_checkpoints_of_an_earlier_one(flags: list[str], tmp_path: Path, left: str) -> None:
    (tmp_path / "work" / "c" / left).mkdir(parents=True)
    says = (
        f"--ckpt_path c already holds {left!r} of an earlier run: go on with that run by --load_checkpoint, give another "
        "--ckpt_path, or remove the folder."
    )
    rows = ["--eval_dataset", str(tmp_path / "files" / "s.jsonl")]
    for run in (
        lambda *more: check(*flags, "--ckpt_path", "c", "--save_steps", "2", *more),
        lambda *more: sft(tmp_path, "--ckpt_path", "c", "--save_steps", "2", *more),
        lambda *more: sft(tmp_path, "--ckpt_path", "c", "--best_metric_key", "eval/loss", *rows, *more),
    ):
        with pytest.raises(ConfigError) as error:
            run()
        assert str(error.value) == says
        run("--load_checkpoint")
        run("--ckpt_path", "other")
    check(*flags, "--ckpt_path", "c")  # writes no checkpoint
    (tmp_path / "work" / "c" / left).rmdir()
    check(*flags, "--ckpt_path", "c", "--save_steps", "2")


@pytest.mark.parametrize("inside", ["best", "step_00000004", "best/model"])
def test_the_final_model_stays_out_of_the_runs_own_checkpoints(flags: list[str], tmp_path: Path, inside: str) -> None:
    says = f"--save_path c/{inside} is where the run keeps its best model or a checkpoint (--ckpt_path c): give another folder."
    for run in (lambda *more: check(*flags, *more), lambda *more: sft(tmp_path, *more)):
        with pytest.raises(ConfigError) as error:
            run("--ckpt_path", "c", "--save_path", f"c/{inside}")
        assert str(error.value) == says
        run("--ckpt_path", "c", "--save_path", "c/final")
        run("--ckpt_path", "c", "--save_path", "c")


def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    preflight.check_backend(BackendName.FSDP2)
    with pytest.raises(ConfigError, match=r"--backend deepspeed needs .* pip install"):
        preflight.check_backend(BackendName.DEEPSPEED)


def replayed(tmp_path: Path, *flags: str) -> None:
    """Check a replay of a run that cut answers off at a penalty."""
    made = parse(RLConfig, [*MADE.split(), "--overlong_buffer_len", "8"], "rl").config
    values = {name: Resolved(value, "default") for name, value in made.model_dump(mode="json").items()}
    RunDirectory.create(tmp_path / "before", "rl", [], values)
    preflight.check_replayed(parse(RLConfig, [*MADE.split(), *flags], "rl").config, tmp_path / "before")


MADE = "--n_samples_per_prompt 2 --rollout_batch_size 4"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "--overlong_buffer_len 8, but here it is None"),
        ("--overlong_buffer_len 8 --overlong_penalty_factor 2", "--overlong_penalty_factor 1.0, but here it is 2.0"),
        (
            "--overlong_buffer_len 8 --stop_properly_penalty_coef 0",
            "--stop_properly_penalty_coef None, but here it is 0.0",
        ),
        ("--overlong_buffer_len 8 --generate_max_len 16", "--generate_max_len 1024, but here it is 16"),
        (
            "--overlong_buffer_len 8 --dynamic_filtering_reward_range 0 2",
            "--dynamic_filtering_reward_range [0.0, 1.0], but here it is [0.0, 2.0]",
        ),
    ],
)
def test_a_replay_agrees_on_what_was_done_to_its_groups(tmp_path: Path, flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        replayed(tmp_path, *flags.split())


def test_a_replay_with_the_same_settings_passes(tmp_path: Path) -> None:
    replayed(tmp_path, "--overlong_buffer_len", "8")


def test_all_that_makes_groups_is_agreed_on() -> None:
    """What filters and penalties read is fixed in a replay, but for what training applies again."""
    read = {
        node.attr
        for made in (LengthPenalties.of, GroupFilter.of)
        for node in ast.walk(ast.parse(dedent(getsource(made))))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    assert "overlong_penalty_factor" in read and "dynamic_filtering" in read
    assert read - {*preflight.REPLAYED} == {"on_reward_error"}
