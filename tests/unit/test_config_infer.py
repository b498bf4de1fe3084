"""The settings of togi infer: established names and defaults, and what is refused. All without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.source import read_attributes
from togi.config.fields import is_later
from togi.config.infer import InferConfig, check_infer
from togi.config.parse import parse
from togi.errors import ConfigError

ROOT = Path(__file__).parents[2]
ESTABLISHED = {
    "eval_task": None,
    "pretrain": "",
    "micro_batch_size": 16,
    "output_path": "",
    "max_new_tokens": 1024,
    "greedy_sampling": False,
    "repetition_penalty": 1.0,
    "best_of_n": 1,
    "post_processor": None,
    "tp_size": 1,
    "max_num_seqs": 256,
    "iter": None,
    "enable_csft": False,
    "csft_prompt": "<rm_score>: 5.00",
    "seed": 1234,
    "full_determinism": False,
    "local_rank": -1,
    "zero_stage": 0,
    "bf16": False,
    "flash_attn": True,
    "disable_fast_tokenizer": False,
    "dataset": "",
    "dataset_probs": None,
    "max_samples": 100_000_000,
    "input_key": "input",
    "output_key": "output",
    "input_template": None,
    "apply_chat_template": False,
    "max_len": 2048,
    "use_ms": False,
    "rollout_batch_size": 2048,
    "prompt_max_len": 1024,
    "normalize_reward": False,
    "top_p": 1.0,
    "temperature": 1.0,
}
NEEDED = "--pretrain m --dataset d.jsonl --output_path o.jsonl"


def test_established_names_and_defaults() -> None:
    for name, default in ESTABLISHED.items():
        assert InferConfig.model_fields[name].default == default, name
    assert {"reward_template", "value_head_prefix"} < InferConfig.model_fields.keys()


COMMANDS = [
    "--eval_task generate_vllm --bf16 --max_new_tokens 2048 --prompt_max_len 2048 --input_key context_messages "
    "--apply_chat_template --temperature 0.9 --zero_stage 0 --best_of_n 4 --enable_prefix_caching --tp_size 1 "
    "--max_num_seqs 64 --iter 3 --rollout_batch_size 10240 --seed 7 --local_rank 0",
    "--eval_task rm --bf16 --max_len 4096 --dataset_probs 1.0 --zero_stage 0 --post_processor iter_dpo "
    "--micro_batch_size 4 --flash_attn",
    "--eval_task rm --normalize_reward --post_processor csft --reward_template {input}<rm_score>:{reward}",
    "--eval_task rm --post_processor null",
    "--eval_task generate --enable_csft --csft_prompt 5.00 --greedy_sampling",
]


@pytest.mark.parametrize("flags", COMMANDS)
def test_established_commands_are_taken(flags: str) -> None:
    check_infer(parse(InferConfig, [*NEEDED.split(), *flags.split()], "infer"))


REFUSED = [
    ("", "--eval_task is required"),
    (
        "--eval_task generate --post_processor rs",
        "--post_processor has no meaning here, --eval_task generate generates",
    ),
    ("--eval_task generate --max_len 10", "--max_len has no meaning here"),
    ("--eval_task rm --best_of_n 4", "--best_of_n has no meaning here, --eval_task rm scores"),
    ("--eval_task rm --temperature 1", "--temperature has no meaning here"),
    ("--eval_task rm --csft_prompt 3", "--csft_prompt asks for a reward in generation"),
    ("--eval_task rm --reward_template {input}{reward}", "only used with --post_processor csft"),
    (
        "--eval_task rm --post_processor csft --reward_template {input}",
        "--reward_template must contain {input} and {reward}",
    ),
    ("--eval_task rm --max_tokens_per_gpu 100", "--max_tokens_per_gpu 100 is less than --max_len 2048"),
    ("--eval_task rm --post_processor best", "--post_processor best: must be"),
    ("--eval_task generate --greedy_sampling --temperature 0.5", "--greedy_sampling takes the most likely token"),
    (
        "--eval_task generate --greedy_sampling --best_of_n 2",
        "--best_of_n 2 with --greedy_sampling would give the same",
    ),
    ("--eval_task generate --temperature 0 --best_of_n 2", "with --temperature 0 would give the same output 2 times"),
    ("--eval_task generate --enforce_eager", "--enforce_eager is vLLM's but --eval_task generate"),
    ("--eval_task generate --rollout_batch_size 4", "--rollout_batch_size is the size of the slices of --iter"),
    ("--eval_task generate --csft_prompt 3", "--csft_prompt is only used with --enable_csft"),
    ("--eval_task generate --input_template {} --apply_chat_template", "--input_template and --apply_chat_template"),
    ("--eval_task generate --tp_size 2", "--tp_size 2 is vLLM's but --eval_task generate"),
    ("--eval_task generate --output_path out.csv", "--output_path out.csv must end in .jsonl"),
    ("--eval_task rouge", "--eval_task rouge: must be generate_vllm, generate or rm"),
]


@pytest.mark.parametrize(("flags", "sentence"), REFUSED)
def test_what_makes_no_sense_is_refused(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_infer(parse(InferConfig, [*NEEDED.split(), *flags.split()], "infer"))
    assert sentence in str(error.value)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but --eval_task rm runs in one process"):
        check_infer(parse(InferConfig, [*NEEDED.split(), "--eval_task", "rm"], "infer"))


def test_every_accepted_flag_is_read_somewhere() -> None:
    accepted = {name for name in InferConfig.model_fields if not is_later(InferConfig, name)}
    assert accepted - read_attributes() == set()
