"""The settings of the supervised and preference commands: established names and defaults, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from togi.config.fields import is_later
from togi.config.parse import parse
from togi.errors import ConfigError, DataError
from togi.methods import METHODS, check_method
from togi.methods.sft import SFT
from togi.run import preflight

COMMANDS = {name: METHODS[name] for name in ("sft", "rm", "dpo", "kto", "prm", "kd")}
# Flags that a command written for the established interface may carry, by command, beside those of all six.
SHARED = (
    "save_path save_steps logging_steps eval_steps ckpt_path max_ckpt_num max_ckpt_mem load_checkpoint "
    "use_ds_universal_ckpt micro_train_batch_size train_batch_size max_norm gradient_checkpointing deepcompile seed "
    "full_determinism local_rank zero_stage bf16 zpg adam_offload flash_attn grad_accum_dtype overlap_comm "
    "gradient_checkpointing_use_reentrant disable_fast_tokenizer max_epochs aux_loss_coef pretrain learning_rate "
    "lr_warmup_ratio l2 adam_betas load_in_4bit lora_rank lora_alpha target_modules lora_dropout dataset dataset_probs "
    "eval_dataset max_samples max_len use_wandb wandb_org wandb_group wandb_project wandb_run_name use_ms"
)
OWN = {
    "sft": "save_hf_ckpt disable_ds_ckpt use_liger_kernel pretrain_mode lr_scheduler ring_attn_size ring_head_stride "
    "packing_samples train_split eval_split multiturn input_key output_key input_template apply_chat_template "
    "tokenizer_chat_template use_tensorboard",
    "rm": "ring_attn_size ring_head_stride packing_samples prompt_key chosen_key rejected_key input_template "
    "apply_chat_template tokenizer_chat_template value_head_prefix compute_fp32_loss margin_loss loss use_tensorboard",
    "dpo": "save_hf_ckpt disable_ds_ckpt use_liger_kernel ring_attn_size ring_head_stride packing_samples prompt_key "
    "chosen_key rejected_key input_template apply_chat_template ref_offload beta ipo label_smoothing nll_loss_coef "
    "ref_pretrain use_tensorboard",
    "kto": "use_liger_kernel input_key output_key label_key input_template apply_chat_template ref_offload beta "
    "desirable_loss_weight undesirable_loss_weight use_tensorboard",
    "prm": "use_liger_kernel lr_scheduler packing_samples input_key label_key placeholder_token reward_tokens",
    "kd": "use_liger_kernel pretrain_mode lr_scheduler input_key output_key input_template apply_chat_template "
    "teacher_model kd_coef teacher_offload use_tensorboard",
}
DEFAULTS = {
    "sft": {"learning_rate": 5e-6, "max_epochs": 2, "max_len": 2048, "train_batch_size": 128, "eval_split": "test"},
    "rm": {"learning_rate": 9e-6, "max_epochs": 1, "max_len": 512, "loss": "sigmoid", "value_head_prefix": "score"},
    "dpo": {"learning_rate": 1e-5, "max_len": 512, "beta": 0.1, "label_smoothing": 0.0, "input_template": None},
    "kto": {"learning_rate": 1e-5, "max_len": 2048, "beta": 0.01, "desirable_loss_weight": 1.0, "output_key": None},
    "prm": {"learning_rate": 1e-6, "max_len": 2048, "reward_tokens": None, "label_key": "label"},
    "kd": {"learning_rate": 5e-6, "max_len": 2048, "kd_coef": 0.4, "output_key": "output"},
}
CKPT = {command: f"./ckpt/checkpoints_{command}" for command in COMMANDS}
REQUIRED = {
    "sft": "--output_key answer",
    "rm": "",
    "dpo": "",
    "kto": "--output_key answer",
    "prm": "--placeholder_token #",
    "kd": "--teacher_model m",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_established_flags_and_defaults(command: str) -> None:
    fields = COMMANDS[command].model_fields
    assert [name for name in f"{SHARED} {OWN[command]}".split() if name not in fields] == []
    for name, value in (DEFAULTS[command] | {"ckpt_path": CKPT[command], "seed": 42, "max_norm": 1.0}).items():
        assert fields[name].default == value, name


def refused(command: str, flags: str) -> str:
    words = f"--pretrain m --dataset d.jsonl {REQUIRED[command]} {flags}".split()
    with pytest.raises(ConfigError) as caught:
        check_method(parse(COMMANDS[command], words, command))
    return str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plain_command_is_let_through(command: str) -> None:
    words = f"--pretrain m --dataset d.jsonl {REQUIRED[command]}".split()
    check_method(parse(COMMANDS[command], words, command))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_required_is_named(command: str) -> None:
    check = COMMANDS[command]
    for words, flag in ((["--dataset", "d"], "--pretrain"), (["--pretrain", "m"], "--dataset")):
        with pytest.raises(ConfigError, match=f"{flag} is required"):
            check_method(parse(check, words, command))


ABOVE = "--gradient_checkpointing --gradient_checkpointing_above 9"
CONTRADICTIONS = [
    ("sft", "--apply_chat_template --input_template {}", ("--input_template", "--apply_chat_template")),
    ("sft", "--multiturn", ("--multiturn", "--apply_chat_template")),
    ("sft", "--multiturn --apply_chat_template", ("--multiturn", "--output_key")),
    ("sft", "--pretrain_mode", ("--pretrain_mode", "--output_key")),
    ("sft", "--pretrain_mode --apply_chat_template", ("--pretrain_mode", "--apply_chat_template")),
    ("sft", "--train_split a --dataset_split b", ("--train_split", "--dataset_split")),
    ("sft", "--input_template a", ("--input_template", "{}")),
    ("sft", "--max_tokens_per_gpu 100", ("--max_tokens_per_gpu", "--max_len")),
    ("sft", "--eval_at_start", ("--eval_at_start", "--eval_dataset")),
    ("sft", "--save_hf_ckpt", ("--save_hf_ckpt", "--save_steps")),
    ("sft", "--disable_ds_ckpt", ("--disable_ds_ckpt", "--save_hf_ckpt")),
    ("sft", "--no_packing_samples --micro_train_batch_size 4", ("--no_packing_samples", "--micro_train_batch_size")),
    ("sft", "--lora_alpha 8", ("--lora_alpha 8 has no effect without --lora_rank: add it, or leave the first out.",)),
    (
        "rm",
        "--value_head_prefix lm_head",
        ("--value_head_prefix lm_head is the name of another part of language models: choose one such as score.",),
    ),
    ("sft", "--tokenizer_chat_template x", ("--tokenizer_chat_template", "--apply_chat_template")),
    ("sft", "--load_in_4bit", ("--load_in_4bit", "--lora_rank")),
    (
        "dpo",
        "--gradient_checkpointing_above 9",
        ("--gradient_checkpointing_above", "without --gradient_checkpointing:"),
    ),
    ("rm", f"{ABOVE} --gradient_checkpointing_use_reentrant", ("--gradient_checkpointing_above", "_use_reentrant")),
    ("sft", f"{ABOVE} --backend deepspeed --zero_stage 3", ("--gradient_checkpointing_above", "--backend deepspeed")),
    ("sft", "--torch_compile --use_liger_kernel", ("--torch_compile", "--use_liger_kernel")),
    ("dpo", "--torch_compile --lora_rank 4 --load_in_4bit --bf16", ("--torch_compile", "--load_in_4bit")),
    ("rm", "--torch_compile --backend deepspeed --zero_stage 3", ("--torch_compile", "--backend deepspeed")),
    ("kto", "--torch_compile --ds_tensor_parallel_size 2", ("--torch_compile", "--ds_tensor_parallel_size 2")),
    ("sft", "--torch_compile --aux_loss_coef 1", ("--torch_compile", "--aux_loss_coef 1")),
    ("dpo", "--ring_head_stride 2", ("--ring_head_stride", "--ring_attn_size")),
    ("rm", "--ring_attn_size 2 --max_tokens_per_gpu 100", ("--ring_attn_size", "--max_tokens_per_gpu", "--max_len")),
    ("sft", "--ds_tensor_parallel_size 2 --ring_attn_size 2", ("--ds_tensor_parallel_size 2", "--ring_attn_size 2")),
    ("rm", "--ds_tensor_parallel_size 2 --backend deepspeed", ("--ds_tensor_parallel_size 2", "--backend fsdp2")),
    ("dpo", "--ds_tensor_parallel_size 2 --zero_stage 0", ("--ds_tensor_parallel_size 2", "--zero_stage 0")),
    ("kto", "--ds_tensor_parallel_size 2 --lora_rank 4", ("--ds_tensor_parallel_size 2", "--lora_rank 4")),
    ("sft", "--ds_tensor_parallel_size 2 --aux_loss_coef 1", ("--ds_tensor_parallel_size 2", "--aux_loss_coef 1")),
    ("kd", "--ds_tensor_parallel_size 2 --adam_offload", ("--ds_tensor_parallel_size 2", "--adam_offload")),
    ("rm", "--lora_dropout 0.1", ("--lora_dropout", "--lora_rank")),
    ("dpo", "--target_modules q_proj", ("--target_modules", "--lora_rank")),
    ("kto", "--lora_rank 8 --target_modules all-linear q_proj", ("--target_modules", "all-linear")),
    ("kd", "--lora_rank 8 --load_in_4bit --zero_stage 3", ("--load_in_4bit", "--zero_stage")),
    ("rm", "--loss logexp --margin_loss", ("--loss", "--margin_loss")),
    ("rm", "--input_template {}", ("--input_template", "--prompt_key")),
    ("dpo", "--ipo --label_smoothing 0.1", ("--ipo", "--label_smoothing")),
    ("dpo", "--precompute_ref --ref_offload", ("--precompute_ref", "--ref_offload")),
    ("kto", "--precompute_ref", ("--precompute_ref", "--ref_offload")),
    ("kto", "--train_batch_size 1", ("--train_batch_size", "two rows")),
    ("kto", "--desirable_loss_weight 0 --undesirable_loss_weight 0", ("--desirable_loss_weight", "--undesirable")),
    ("prm", "--reward_tokens + +", ("--reward_tokens", "different")),
    ("prm", "--reward_tokens + #", ("--placeholder_token", "--reward_tokens")),
    ("kd", "--generate_max_len 5", ("--generate_max_len", "--on_policy_share")),
    ("kd", "--rollout_engine transformers", ("--rollout_engine", "--on_policy_share")),
    ("kd", "--on_policy_share 0.5 --pretrain_mode", ("--on_policy_share", "--pretrain_mode")),
    (
        "kd",
        "--on_policy_share 1 --rollout_engine transformers --enforce_eager",
        ("--enforce_eager", "--rollout_engine"),
    ),
    ("kd", "--pretrain_mode --apply_chat_template", ("--pretrain_mode", "--apply_chat_template")),
]


@pytest.mark.parametrize(("command", "flags", "named"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_name_both_flags(command: str, flags: str, named: tuple[str, str]) -> None:
    message = refused(command, flags)
    assert all(name in message for name in named), message


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("rm", "--loss pairwise", "--loss pairwise: must be sigmoid or logexp"),
        ("dpo", "--label_smoothing 0.5", "--label_smoothing 0.5: must be less than 0.5"),
        ("sft", "--lora_rank -1", "--lora_rank -1: must be at least 0"),
        ("kd", "--on_policy_share 2", "--on_policy_share 2: must be at most 1"),
        ("kd", "--kd_coef 1.5", "--kd_coef 1.5: must be at most 1"),
        ("sft", "--overlong cut", "--overlong cut: must be drop, truncate or error"),
        ("prm", "--lr_scheduler quadratic", "--lr_scheduler quadratic: must be"),
    ],
)
def test_values_that_cannot_be(command: str, flags: str, sentence: str) -> None:
    assert sentence in refused(command, flags)


def test_the_default_template_gives_way_to_a_chat_template() -> None:
    words = ["--pretrain", "m", "--dataset", "d", "--apply_chat_template", "--input_key", "messages"]
    check_method(parse(SFT, words, "sft"))


def test_launcher_flags_are_taken() -> None:
    """The DeepSpeed launcher adds --local_rank to every command."""
    assert parse(SFT, ["--local_rank=1"], "sft").config.local_rank == 1
    assert not is_later(SFT, "local_rank")


def test_preflight_looks_at_models_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, heads in (("model", 8), ("teacher", 6)):
        (tmp_path / name).mkdir()
        settings = {"max_position_embeddings": 256, "num_key_value_heads": heads}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')

    def check(command: str, flags: str) -> None:
        words = f"--pretrain model --dataset rows.jsonl {flags}".split()
        preflight.check_offline(parse(COMMANDS[command], words, command))

    sound = "--input_key question --output_key answer --max_len 256"
    check("sft", sound)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match=r"--dataset: Line 1 of rows.jsonl has no field 'input'.*--input_key"):
        check("sft", "--output_key answer --max_len 256")
    with pytest.raises(ConfigError, match="--max_len 2048 is more than the 256 positions of model"):
        check("sft", "--input_key question --output_key answer")
    with pytest.raises(ConfigError, match="--ring_attn_size 2 needs 2 processes and this is one: start with torchrun"):
        check("sft", f"{sound} --ring_attn_size 2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="--ring_attn_size 3 does not divide the 4 processes"):
        check("sft", f"{sound} --ring_attn_size 3")
    with pytest.raises(
        ConfigError, match="--ring_head_stride 4 does not divide the 6 key/value heads of --teacher_model"
    ):
        check("kd", f"{sound} --teacher_model teacher --ring_attn_size 2 --ring_head_stride 4")
    check("sft", f"{sound} --ring_attn_size 2 --ring_head_stride 4")
    with pytest.raises(ConfigError, match="--ds_tensor_parallel_size 3 does not divide the 4 processes"):
        check("sft", f"{sound} --ds_tensor_parallel_size 3")
    with pytest.raises(ConfigError, match=r"--ds_tensor_parallel_size 2 can split llama.* but --pretrain model is"):
        check("sft", f"{sound} --ds_tensor_parallel_size 2")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(DataError, match="--eval_dataset"):
        check("sft", f"{sound} --eval_dataset gone.jsonl")
    with pytest.raises(ConfigError, match=r"--teacher_model \./gone is not a folder"):
        check("kd", f"{sound} --teacher_model ./gone")
    with pytest.raises(ConfigError, match=r"--ref_pretrain \./gone is not a folder"):
        check("dpo", "--ref_pretrain ./gone --chosen_key question --rejected_key answer --max_len 256")


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    script = (
        "import sys; from togi.cli.main import main\n"
        "status = main(['dpo', '--pretrain', '/nowhere', '--dataset', 'd.jsonl'])\n"
        "assert status == 2 and 'torch' not in sys.modules"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--pretrain /nowhere is not a folder" in done.stderr
    assert time.monotonic() - start < 5  # under one second on an idle machine


FIELD_COMMANDS = {
    "sft": "--max_len 4096 --dataset Open-Orca/OpenOrca --input_key question --output_key response --train_batch_size 256 "
    "--micro_train_batch_size 2 --max_samples 500000 --pretrain meta-llama/Meta-Llama-3-8B --save_path ./ckpt "
    "--save_steps -1 --logging_steps 1 --eval_steps -1 --zero_stage 2 --max_epochs 1 --packing_samples --bf16 "
    "--flash_attn --learning_rate 5e-6 --gradient_checkpointing --use_wandb TOKEN",
    "rm": "--save_path ./ckpt --save_steps -1 --logging_steps 1 --eval_steps -1 --train_batch_size 256 "
    "--micro_train_batch_size 1 --pretrain OpenRLHF/Llama-3-8b-sft-mixture --bf16 --max_epochs 1 --max_len 8192 "
    "--zero_stage 3 --learning_rate 9e-6 --dataset OpenRLHF/preference_dataset_mixture2_and_safe_pku "
    "--apply_chat_template --chosen_key chosen --rejected_key rejected --flash_attn --packing_samples "
    "--gradient_checkpointing --use_wandb TOKEN",
}


@pytest.mark.parametrize("command", FIELD_COMMANDS)
def test_commands_of_the_field_are_taken_unchanged(command: str) -> None:
    words = FIELD_COMMANDS[command].split()
    if command == "sft":
        words += ["--input_template", "User: {}\nAssistant: "]
    check_method(parse(COMMANDS[command], words, command))
